"""The page on which the OpenAPI document can be read and tried; its files come from this process."""

import base64
import hashlib
import re
from collections.abc import Iterable

from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

# Where FastAPIOffline mounts the files of Swagger UI.
DOCS_FILES = "/static-offline-docs"


def swagger_page(title: str, policy: str) -> HTMLResponse:
    """The page, with a Content-Security-Policy that adds what it needs to `policy`."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=title,
        swagger_js_url=f"{DOCS_FILES}/swagger-ui-bundle.js",
        swagger_css_url=f"{DOCS_FILES}/swagger-ui.css",
        swagger_favicon_url=f"{DOCS_FILES}/favicon.png",
    )
    scripts = re.findall(rb"<script>(.*?)</script>", bytes(page.body), re.DOTALL)
    page.headers["Content-Security-Policy"] = _docs_policy(scripts, policy)
    page.headers["X-Content-Type-Options"] = "nosniff"
    return page


def _docs_policy(scripts: Iterable[bytes], policy: str) -> str:
    """The policy with Swagger UI's own inline scripts, by their hashes, and inline styles."""
    hashes = [base64.b64encode(hashlib.sha256(script).digest()).decode() for script in scripts]
    allowed = " ".join(["'self'", *(f"'sha256-{value}'" for value in hashes)])
    policy = policy.replace("script-src 'self'", f"script-src {allowed}")
    return policy.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
