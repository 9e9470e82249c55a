"""`prometheus/targets`: what Prometheus shall ask, for its http_sd. An API token lets it in, as bearer or as password.

Prometheus keeps its last list when we answer with an error, and forgets all of it over an empty one. So whatever goes
wrong here stays an error.
"""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from portal.api.blueprint import Blueprint, Schema
from portal.api.guard import requires
from portal.services import monitoring_targets
from portal.services.actors import STAFF
from portal.services.monitoring_targets import NODE, NVIDIA

bp = Blueprint("prometheus", __name__, url_prefix="/api/v1/prometheus", description="For Prometheus")


class TargetArgs(Schema):
    job = ma.fields.String(
        validate=ma.validate.OneOf((NODE.job, NVIDIA.job)),
        metadata={"description": "Only this job's part, for scrape configurations that differ"},
    )


class TargetGroupOut(Schema):
    """One target with its labels, as http_sd has it."""

    targets = ma.fields.List(ma.fields.String(), required=True, metadata={"example": ["192.0.2.7:9100"]})
    labels = ma.fields.Dict(keys=ma.fields.String(), values=ma.fields.String(), required=True)


@bp.get("/targets")
@requires(*STAFF, scope="prometheus")
@bp.arguments(TargetArgs, location="query")
@bp.response(200, TargetGroupOut(many=True))
def list_targets(args: dict[str, Any]) -> list[dict[str, Any]]:
    """Every exporter of every host in service"""
    return monitoring_targets.target_groups(**args)
