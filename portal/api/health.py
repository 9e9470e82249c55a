"""`/healthz`: whether this process can answer and reach its database. For load balancers; it holds no data."""

from __future__ import annotations

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue

from portal.api.guard import public
from portal.db import db

bp = Blueprint("health", __name__)


@bp.get("/healthz")
@public("a load balancer has no account, and the answer is one word")
def healthz() -> ResponseReturnValue:
    db.execute_sql("SELECT 1")
    return jsonify(status="ok")
