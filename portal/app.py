"""The application factory. It only wires: settings in, Flask application out; the rules are in `services/`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from flask import Flask, Response, g, request
from flask_babel import Babel
from flask_limiter import Limiter
from flask_limiter.util import get_remote_address
from werkzeug.exceptions import BadRequest, LengthRequired
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.routing import IntegerConverter

from portal import api, start, web
from portal.api import agents, auth, docs, health, metrics, problems
from portal.db import db
from portal.errors import Forbidden
from portal.proxies import KnownProxies
from portal.services import users
from portal.settings import Settings
from portal.web import frame

MAX_BODY_BYTES = 1024 * 1024
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
OWN_SITE = ("same-origin", "none")  # none: typed in, or a bookmark
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


class IdConverter(IntegerConverter):
    """`<int:…>` in addresses: a number that no table can hold is an unknown address, not a database error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"max": 2**31 - 1, **kwargs})


def create_app(settings: Settings) -> Flask:
    """The whole portal as a WSGI application, with what its services stand on bound to this process."""
    start.bind(settings)
    return build(settings)


def build(settings: Settings) -> Flask:
    """The application alone."""
    app = Flask("portal", static_folder="web/static", template_folder="web/templates")
    app.url_map.converters["int"] = IdConverter
    app.config.from_mapping(config_of(settings))
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {agents.PREFIX: agents.door()})  # type: ignore[method-assign]  # Flask's documented way
    app.wsgi_app = metrics.counting(app.wsgi_app)  # type: ignore[method-assign]  # Flask's documented way
    if settings.trusted_proxies:
        app.wsgi_app = KnownProxies(app.wsgi_app, settings.trusted_proxies)  # type: ignore[method-assign]  # the same
    auth.jwt.init_app(app)
    Babel(app, locale_selector=locale)
    limiter = Limiter(
        get_remote_address,
        default_limits=[settings.people_limit],
        default_limits_per_method=False,
        storage_uri=settings.redis_url or "memory://",
        storage_options={"socket_connect_timeout": 1, "socket_timeout": 1} if settings.redis_url else {},
        in_memory_fallback_enabled=True,  # a Redis that is away must not lift the limit
        swallow_errors=True,  # of two requests that see it die, the library counts only the first in memory
        key_prefix="remotegpu",
        headers_enabled=False,  # it would put its own Retry-After over ours
        app=app,
    )
    limiter.request_filter(_is_no_person)
    _register(app)
    app.before_request(_refuse_cross_site)
    app.before_request(_refuse_nul)
    app.before_request(_limit_body)
    app.after_request(_harden)
    app.teardown_request(_let_go_of_database)
    problems.install(app)
    return app


def config_of(settings: Settings) -> dict[str, Any]:
    return {
        "SETTINGS": settings,
        "SECRET_KEY": settings.secret_key,
        "SESSION_COOKIE_SECURE": settings.is_secure,
        "SESSION_COOKIE_SAMESITE": "Lax",
        "MAX_CONTENT_LENGTH": MAX_BODY_BYTES,
        "JWT_SECRET_KEY": settings.jwt_secret_key,
        "JWT_ALGORITHM": "HS256",
        "JWT_DECODE_ALGORITHMS": ["HS256"],
        "JWT_TOKEN_LOCATION": ["headers", "cookies"],
        "JWT_ACCESS_TOKEN_EXPIRES": timedelta(seconds=settings.access_token_s),
        "JWT_REFRESH_TOKEN_EXPIRES": timedelta(seconds=settings.refresh_token_s),
        "JWT_COOKIE_SECURE": settings.is_secure,
        "JWT_COOKIE_SAMESITE": "Lax",
        "JWT_COOKIE_CSRF_PROTECT": True,
        "JWT_CSRF_CHECK_FORM": True,  # a page's form sends it as the field csrf_token
        "JWT_REFRESH_COOKIE_PATH": "/api/v1/auth",
        "JWT_ENCODE_ISSUER": "remotegpu",
        "JWT_DECODE_ISSUER": "remotegpu",
        "BABEL_DEFAULT_LOCALE": "en",
        "BABEL_TRANSLATION_DIRECTORIES": "web/translations",
        "API_TITLE": "RemoteGPU",
        "API_VERSION": "v1",
        "OPENAPI_VERSION": "3.1.0",
        "OPENAPI_URL_PREFIX": "/api",
        "OPENAPI_JSON_PATH": "openapi.json",
        "API_SPEC_OPTIONS": {"components": {"securitySchemes": docs.SECURITY_SCHEMES}},
    }


def _register(app: Flask) -> None:
    smorest = docs.Api(app)
    for blueprint in api.BLUEPRINTS:
        smorest.register_blueprint(blueprint)
    app.register_blueprint(docs.bp)
    app.register_blueprint(health.bp)
    app.register_blueprint(metrics.bp)
    for pages in web.BLUEPRINTS:
        app.register_blueprint(pages)
    frame.install(app)


def locale() -> str:
    """The user's language: their choice, the cookie, what the browser asks for, or English."""
    user = g.get("user")
    for wanted in (user.locale if user is not None else None, request.cookies.get("locale")):
        if wanted in users.LOCALES:
            return str(wanted)
    asked = request.accept_languages.best_match(("en", "zh-CN", "zh"), "en")
    return "zh_CN" if asked.startswith("zh") else "en"


def _is_no_person() -> bool:
    """Static files and health checks are not counted; agents come through a door of their own (api/agents.py)."""
    return request.path.startswith("/static/") or request.path == "/healthz"


def _refuse_cross_site() -> None:
    """What another site makes a browser send changes nothing here; signing in, which has no token yet, included.

    Every browser of today says where a request comes from, and no page can forge it. Programs say nothing.
    """
    if request.method not in SAFE_METHODS and request.headers.get("Sec-Fetch-Site", "none") not in OWN_SITE:
        raise Forbidden("Another site sent this. Open the portal itself and do it there.", code="cross_site")


def _refuse_nul() -> None:
    """No address, query or form needs one, and PostgreSQL's driver stumbles over it. JSON: api/blueprint.py."""
    is_form = request.mimetype == "application/x-www-form-urlencoded"
    texts = [request.path, *request.args.values(), *(request.form.values() if is_form else ())]
    if any("\x00" in text for text in texts):
        raise BadRequest("Leave out NUL characters.")


def _limit_body() -> None:
    if "Transfer-Encoding" in request.headers:
        # werkzeug 3.1 cuts a chunked body at the limit without a word, and what is left might be read as a whole one.
        raise LengthRequired("Send the body with a Content-Length.")


def _harden(response: Response) -> Response:
    headers = response.headers
    headers.setdefault("Content-Security-Policy", CONTENT_SECURITY_POLICY)
    headers.setdefault("X-Content-Type-Options", "nosniff")
    headers.setdefault("X-Frame-Options", "DENY")
    headers.setdefault("Referrer-Policy", "same-origin")
    headers.setdefault("Cross-Origin-Opener-Policy", "same-origin")
    if not request.path.startswith("/static/"):
        headers.setdefault("Cache-Control", "no-store")
    if request.is_secure:
        headers.setdefault("Strict-Transport-Security", "max-age=31536000")
    return response


def _let_go_of_database(_error: BaseException | None) -> None:
    """A connection is opened by the first query and lasts as long as the request, no longer."""
    if not db.is_closed() and not db.in_transaction():
        db.close()
