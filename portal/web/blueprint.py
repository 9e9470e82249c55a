"""The pages' one blueprint; each module of `web/` adds its views to it."""

from flask import Blueprint

bp = Blueprint("web", __name__)
