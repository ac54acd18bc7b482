"""The page of the documentation; `test_api` asks a service for it."""

from bcd.serving import front
from bcd.serving.openapi import swagger


def test_only_its_own_scripts_may_run():
    page = swagger.swagger_page("bcd", front.PAGE_POLICY)
    assert b"https://" not in bytes(page.body)
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self' 'sha256-")
    assert policy.count("'sha256-") == bytes(page.body).count(b"<script>") == 1
    assert "style-src 'self' 'unsafe-inline'" in policy
