"""An adapter as files: written, read, uploaded and downloaded."""
