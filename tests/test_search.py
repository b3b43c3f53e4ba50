"""`mgfc search`: the real client against the loopback server of `hub_server.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
import yaml
from hub_server import HubServer, Reply, run_python
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from tiny import calibrated, tiny_vit

from mgfc import AdapterNotFoundError
from mgfc.cli import main
from mgfc.storage.search import Figure, search

BASE = "facebook/dinov2-small"


def card(scores: dict[str, float] | None = None, **header: Any) -> bytes:
    """A model card with a header as `mgfc.storage.card` writes it."""
    results = [EvalResult("image-segmentation", name, name, "mean_iou", value) for name, value in (scores or {}).items()]
    values = {"library_name": "mgfc", "base_model": BASE, "base_model_relation": "adapter", "tags": ["mgfc"], **header}
    data = ModelCardData(**values, model_name="it" if results else None, eval_results=results or None)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n")).encode()


@pytest.fixture
def adapters(hub: HubServer) -> HubServer:
    hub.put("org/town-small", {"README.md": card({"town/val": 61.5, "camvid/day": 47}, datasets=["town", "city"])})
    hub.put("org/town-base", {"README.md": card(base_model="facebook/dinov2-base")})
    hub.put("other/night", {"README.md": card({"night": 30})}, gated=True)
    hub.put("org/secret-town", {"README.md": card()}, private=True)
    hub.put("org/by-another-library", {"README.md": card(library_name="peft")})
    hub.put("org/town-without-card", {"config.json": b"{}"})
    for downloads, name in enumerate(("other/night", "org/town-base", "org/town-small", "org/by-another-library")):
        hub.repos[name].downloads = 1000 * downloads
    return hub


def names(*words: str, **options: Any) -> list[str]:
    return [listing.name for listing in search(" ".join(words), **options)]


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["search", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_adapters_of_this_library_the_most_downloaded_first(adapters: HubServer) -> None:
    assert names() == ["org/town-small", "org/town-base", "other/night"]
    assert names(limit=2) == ["org/town-small", "org/town-base"]
    (request,) = adapters.requests[:1]
    assert "cardData" not in request.query, "one card with an odd header must not spoil the list"


@pytest.mark.parametrize(
    ("words", "base_model", "expected"),
    [
        (["town"], None, ["org/town-small", "org/town-base"]),
        (["TOWN", "base"], None, ["org/town-base"]),
        ([], BASE, ["org/town-small", "other/night"]),
        (["town"], BASE, ["org/town-small"]),
        (["nothing"], None, []),
        ([], "facebook/dinov2", []),
    ],
)
def test_by_words_and_base_model(adapters: HubServer, words: list[str], base_model: str | None, expected: list[str]) -> None:
    assert names(*words, base_model=base_model) == expected


def test_private_ones_show_to_their_owners(adapters: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", adapters.stranger_token)
    assert "org/secret-town" not in names()
    monkeypatch.setenv("HF_TOKEN", adapters.token)
    assert "org/secret-town" in names()


def test_all_pages_are_read(adapters: HubServer) -> None:
    expected = names()
    adapters.page = 1
    adapters.requests.clear()
    assert names() == expected and len(adapters.requests) == 4
    adapters.requests.clear()
    assert names(limit=1) == expected[:1] and len(adapters.requests) == 2, "one of another library, and what was asked for"


def test_a_pushed_adapter_is_found(logged_in: HubServer) -> None:
    training = {"metrics": {"camvid/day mIoU": 47.25, "val mIoU": 61, "loss": 99.0}, "datasets": ["synth_town"]}
    calibrated(tiny_vit()).push_to_hub("org/mine", training=training, base_model=BASE)
    (found,) = search(base_model=BASE)
    assert (found.name, found.base_model, found.datasets) == ("org/mine", BASE, ("synth_town",))
    assert found.best == Figure(61, "mean_iou", "val")
    assert search(base_model="facebook/dinov2-base") == []


def result(*metrics: Any, dataset: Any = None) -> Any:
    return [{"results": [{"dataset": dataset, "metrics": list(metrics)}]}]


@pytest.mark.parametrize(
    ("index", "best"),
    [
        (None, None),
        ("none", None),
        ([{"results": "none"}, 3, *result({"type": "mean_iou", "value": "high"})], None),
        (result({"type": "mean_iou", "value": True}, {"type": "mean_iou"}, "metric"), None),
        (result(*({"type": "mean_iou", "value": value} for value in (10**400, math.inf, -math.inf, math.nan))), None),
        (result({"type": "mean_iou", "value": 3}, dataset=[]), Figure(3, "mean_iou", "unknown data")),
        (
            result({"type": "accuracy", "value": 99.5}, {"type": "f1", "value": 99.9}, dataset={"type": "a"}),
            Figure(99.5, "accuracy", "a"),
        ),
    ],
)
def test_results_of_any_form(hub: HubServer, index: Any, best: Figure | None, capsys: pytest.CaptureFixture[str]) -> None:
    header = {"library_name": "mgfc", "tags": ["mgfc"], "model-index": index}
    hub.put("org/odd", {"README.md": f"---\n{yaml.safe_dump(header)}---\n".encode()})
    (found,) = search()
    assert found.best == best and found.base_model is None and found.datasets == ()
    assert main(["search"]) == 0 and "org/odd" in capsys.readouterr().out


def test_text(adapters: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["NAME", "BASE", "MODEL", "DATASETS", "BEST", "FIGURE", "DOWNLOADS"],
        ["org/town-small", BASE, "town,", "city", "61.5", "mIoU", "on", "town/val", "2,000"],
        ["org/town-base", "facebook/dinov2-base", "1,000"],
        ["other/night", "(gated)", BASE, "30", "mIoU", "on", "night", "0"],
    ]
    assert "`mgfc info org/town-small`" in lines[-1]
    assert main(["search", "--limit", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "These are the first 1; --limit lists more."


def test_json(adapters: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = as_json(capsys, "town", "--base-model", BASE)
    assert status == 0
    assert found == {
        "endpoint": adapters.endpoint,
        "words": "town",
        "base_model": BASE,
        "adapters": [
            {
                "name": "org/town-small",
                "base_model": BASE,
                "datasets": ["town", "city"],
                "best": {"value": 61.5, "metric": "mean_iou", "dataset": "town/val"},
                "downloads": 2000,
                "gated": False,
                "private": False,
            }
        ],
    }


def test_a_name_of_timm(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    hub.put("org/timm-s", {"README.md": card(base_model="timm/vit_small_patch14_dinov2.lvd142m")})
    _, found = as_json(capsys, "--base-model", "vit_small_patch14_dinov2.lvd142m")
    assert [adapter["name"] for adapter in found["adapters"]] == ["org/timm-s"]


def test_nothing_found(adapters: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "no", "such", "--base-model", BASE]) == 0
    assert capsys.readouterr().out == (
        f"No mgfc adapter on {adapters.endpoint} for {BASE} with 'no such' in its name. Leave out words or the base model.\n"
    )
    adapters.reset()
    assert main(["search"]) == 0
    assert "None was published there so far." in capsys.readouterr().out
    assert as_json(capsys)[1]["adapters"] == []


def test_names_of_strangers_do_not_steer_the_terminal(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    hub.put("org/evil", {"README.md": card({"\x1b[2Jval\n": 50}, datasets=["\u202egnp.exe"])})
    assert main(["search"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\u202e" not in printed and "50 mIoU on" in printed and len(printed.splitlines()) == 4


def refused(capsys: pytest.CaptureFixture[str], *facts: str) -> None:
    assert main(["search"]) == 1
    output = capsys.readouterr()
    assert not output.out and output.err.startswith("AdapterNotFoundError: ") and "Traceback" not in output.err
    assert [fact for fact in facts if fact not in output.err] == [], output.err


def test_no_network(adapters: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    with adapters.offline():
        refused(capsys, adapters.endpoint, "cannot be reached (ConnectError", "Check the network, and HF_ENDPOINT")
    with adapters.offline():
        status, found = as_json(capsys)
    assert (status, found["error"]) == (1, "AdapterNotFoundError")


def test_offline_mode(adapters: HubServer, offline_mode: None, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "HF_HUB_OFFLINE is set")
    assert not adapters.requests


def test_what_the_hub_refuses(adapters: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    adapters.fail(status=404)
    refused(capsys, "found status 404", "check that it names a Hub")
    adapters.fail(times=9, status=503)
    refused(capsys, "found status 503", "Try again")
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    refused(capsys, "refused the search (status 401)", "Log in anew")


@pytest.mark.parametrize(
    "answer",
    ["<html></html>", '{"error": "x"}', '["a"]', "[{}]", "[null]", "3", '[{"id": "a", "library_name": "mgfc", "tags": 3}]'],
)
def test_an_endpoint_that_is_no_hub(
    adapters: HubServer, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapters, "_dispatch", lambda request, body: Reply(body=answer.encode()))
    refused(capsys, "expected a list of models, found another answer", "Check that HF_ENDPOINT names a Hub")


@pytest.mark.parametrize("endpoint", ["nonsense", "http://[bad", "http://127.0.0.1:99999", "ftp://example.org"])
def test_endpoints_of_a_wrong_form(hub: HubServer, endpoint: str) -> None:
    done = run_python("from mgfc.cli import main; raise SystemExit(main(['search', 'x']))", HF_ENDPOINT=endpoint)
    assert done.returncode == 1 and "\n" not in done.stderr.strip(), done.stderr
    assert done.stderr.startswith("AdapterNotFoundError: ") and endpoint in done.stderr and "HF_ENDPOINT" in done.stderr


def test_the_endpoint_of_the_environment(adapters: HubServer) -> None:
    code = "from mgfc.cli import main; main(['search', 'night'])"
    assert "other/night (gated)" in run_python(code, HF_ENDPOINT=adapters.endpoint).stdout


def test_the_error_keeps_its_cause(adapters: HubServer) -> None:
    with adapters.offline(), pytest.raises(AdapterNotFoundError) as caught:
        search()
    assert isinstance(caught.value.__cause__, httpx2.ConnectError)


@pytest.mark.parametrize("limit", ["0", "-1", "many"])
def test_wrong_limits(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["search", "--limit", limit])
    assert exit_.value.code == 2
    assert f"--limit: expected a whole number above 0, found '{limit}'" in capsys.readouterr().err


def test_the_server_lists_as_the_hub_does(adapters: HubServer) -> None:
    api = HfApi()
    models: Callable[..., list[str]] = lambda **options: [model.id for model in api.list_models(**options)]  # noqa: E731
    assert models(filter="base_model:adapter:facebook/dinov2-base") == ["org/town-base"]
    assert models(trained_dataset="city") == ["org/town-small"]
    (shown,) = api.list_models(search="town-small", expand=["model-index", "tags"])
    assert shown.model_index[0]["results"][0]["metrics"][0]["value"] == 61.5 and shown.downloads is None
    assert api.model_info("org/town-small").id == "org/town-small"
