"""Mapillary Vistas: the names of its label ids, and the evaluation class of each.

Names are those of `labels` in config.json (v1.2) and config_v2.0.json, in the order of the ids. The classes of v1.2 are
those that domain generalised segmentation is scored with: `get_trans_idx` in Rein's
tools/convert_datasets/mapillary2cityscape.py. No such table is published for v2.0; each of its names gets the class of the
v1.2 name that it was split from, and where it is new the one that Cityscapes' definitions give it.
"""

from __future__ import annotations

from data.classes import CITYSCAPES, IGNORE

_V1_2 = """
animal--bird animal--ground-animal construction--barrier--curb construction--barrier--fence
construction--barrier--guard-rail construction--barrier--other-barrier construction--barrier--wall
construction--flat--bike-lane construction--flat--crosswalk-plain construction--flat--curb-cut
construction--flat--parking construction--flat--pedestrian-area construction--flat--rail-track construction--flat--road
construction--flat--service-lane construction--flat--sidewalk construction--structure--bridge
construction--structure--building construction--structure--tunnel human--person human--rider--bicyclist
human--rider--motorcyclist human--rider--other-rider marking--crosswalk-zebra marking--general nature--mountain
nature--sand nature--sky nature--snow nature--terrain nature--vegetation nature--water object--banner object--bench
object--bike-rack object--billboard object--catch-basin object--cctv-camera object--fire-hydrant object--junction-box
object--mailbox object--manhole object--phone-booth object--pothole object--street-light object--support--pole
object--support--traffic-sign-frame object--support--utility-pole object--traffic-light object--traffic-sign--back
object--traffic-sign--front object--trash-can object--vehicle--bicycle object--vehicle--boat object--vehicle--bus
object--vehicle--car object--vehicle--caravan object--vehicle--motorcycle object--vehicle--on-rails
object--vehicle--other-vehicle object--vehicle--trailer object--vehicle--truck object--vehicle--wheeled-slow
void--car-mount void--ego-vehicle void--unlabeled
"""

_V2_0 = """
animal--bird animal--ground-animal construction--barrier--ambiguous construction--barrier--concrete-block
construction--barrier--curb construction--barrier--fence construction--barrier--guard-rail
construction--barrier--other-barrier construction--barrier--road-median construction--barrier--road-side
construction--barrier--separator construction--barrier--temporary construction--barrier--wall
construction--flat--bike-lane construction--flat--crosswalk-plain construction--flat--curb-cut
construction--flat--driveway construction--flat--parking construction--flat--parking-aisle
construction--flat--pedestrian-area construction--flat--rail-track construction--flat--road
construction--flat--road-shoulder construction--flat--service-lane construction--flat--sidewalk
construction--flat--traffic-island construction--structure--bridge construction--structure--building
construction--structure--garage construction--structure--tunnel human--person--individual human--person--person-group
human--rider--bicyclist human--rider--motorcyclist human--rider--other-rider marking--continuous--dashed
marking--continuous--solid marking--continuous--zigzag marking--discrete--ambiguous marking--discrete--arrow--left
marking--discrete--arrow--other marking--discrete--arrow--right marking--discrete--arrow--split-left-or-straight
marking--discrete--arrow--split-right-or-straight marking--discrete--arrow--straight marking--discrete--crosswalk-zebra
marking--discrete--give-way-row marking--discrete--give-way-single marking--discrete--hatched--chevron
marking--discrete--hatched--diagonal marking--discrete--other-marking marking--discrete--stop-line
marking--discrete--symbol--bicycle marking--discrete--symbol--other marking--discrete--text
marking-only--continuous--dashed marking-only--discrete--crosswalk-zebra marking-only--discrete--other-marking
marking-only--discrete--text nature--mountain nature--sand nature--sky nature--snow nature--terrain nature--vegetation
nature--water object--banner object--bench object--bike-rack object--catch-basin object--cctv-camera
object--fire-hydrant object--junction-box object--mailbox object--manhole object--parking-meter object--phone-booth
object--pothole object--sign--advertisement object--sign--ambiguous object--sign--back object--sign--information
object--sign--other object--sign--store object--street-light object--support--pole object--support--pole-group
object--support--traffic-sign-frame object--support--utility-pole object--traffic-cone object--traffic-light--cyclists
object--traffic-light--general-horizontal object--traffic-light--general-single object--traffic-light--general-upright
object--traffic-light--other object--traffic-light--pedestrians object--traffic-sign--ambiguous
object--traffic-sign--back object--traffic-sign--direction-back object--traffic-sign--direction-front
object--traffic-sign--front object--traffic-sign--information-parking object--traffic-sign--temporary-back
object--traffic-sign--temporary-front object--trash-can object--vehicle--bicycle object--vehicle--boat
object--vehicle--bus object--vehicle--car object--vehicle--caravan object--vehicle--motorcycle object--vehicle--on-rails
object--vehicle--other-vehicle object--vehicle--trailer object--vehicle--truck object--vehicle--vehicle-group
object--vehicle--wheeled-slow object--water-valve void--car-mount void--dynamic void--ego-vehicle void--ground
void--static void--unlabeled
"""

V1_2, V2_0 = _V1_2.split(), _V2_0.split()

# A name that ends in * stands for all that begin so. Some names are of one version only.
CLASSES = {
    "road": "construction--flat--road construction--flat--bike-lane construction--flat--crosswalk-plain "
    "construction--flat--parking construction--flat--parking-aisle construction--flat--service-lane "
    "construction--flat--road-shoulder marking--* marking-only--*",
    "sidewalk": "construction--flat--sidewalk construction--flat--curb-cut construction--flat--pedestrian-area "
    "construction--flat--traffic-island construction--barrier--curb",
    "building": "construction--structure--building construction--structure--garage",
    "wall": "construction--barrier--wall",
    "fence": "construction--barrier--fence",
    "pole": "object--support--pole object--support--pole-group object--support--utility-pole object--street-light",
    "traffic light": "object--traffic-light*",
    "traffic sign": "object--traffic-sign--* object--support--traffic-sign-frame",
    "vegetation": "nature--vegetation",
    "terrain": "nature--terrain",
    "sky": "nature--sky",
    "person": "human--person*",
    "rider": "human--rider--*",
    "car": "object--vehicle--car",
    "truck": "object--vehicle--truck",
    "bus": "object--vehicle--bus",
    "train": "object--vehicle--on-rails",
    "motorcycle": "object--vehicle--motorcycle",
    "bicycle": "object--vehicle--bicycle",
}


def evaluation_class(name: str) -> int:
    """The evaluation class of a label's name, or 255."""
    for index, wanted in enumerate(CITYSCAPES):
        for pattern in CLASSES[wanted].split():
            if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
                return index
    return IGNORE


V1_2_IDS = {index: evaluation_class(name) for index, name in enumerate(V1_2)}
V2_0_IDS = {index: evaluation_class(name) for index, name in enumerate(V2_0)}
