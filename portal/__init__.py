"""The portal records, decides and shows. The host-side program is in `agent/`, what is done to hosts in `roles/`."""

__version__ = "0.1.0"
