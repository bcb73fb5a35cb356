"""What a sandbox may connect to, and to which of its requests Vercel's firewall adds a token it never holds."""

from __future__ import annotations

import base64
import json
import re
from urllib.parse import urlsplit

from vercel.sandbox import (
    NetworkPolicy,
    NetworkPolicyMatcher,
    NetworkPolicyRequestMatcher,
    NetworkPolicyRule,
    NetworkPolicyTransform,
    Sandbox,
)

from _shared.runner_job import sessions_token
from _shared.settings import Settings
from vercel_settings import VercelSettings

_NO_SECRET = base64.urlsafe_b64encode(b'{"sessions_token": "added-by-the-firewall"}').decode()


class Firewall:
    """The policy of every sandbox of one environment."""

    def __init__(self, settings: Settings, own: VercelSettings) -> None:
        self._settings = settings
        self._own = own

    def policy(self, rules: tuple[NetworkPolicyRule, ...] = ()) -> NetworkPolicy:
        api = urlsplit(self._settings.base_url).hostname or ""
        return NetworkPolicy.custom({**dict.fromkeys(self._own.allowed_hosts, ()), api: rules})

    async def close_off(self, sandbox: Sandbox) -> None:
        """Sets the network policy if the sandbox has another one, as after a change of SANDBOX_ALLOWED_HOSTS."""
        wanted, has = set(self.policy().allow), sandbox.network_policy
        as_wanted = has is not None and has.mode == "custom" and set(has.allowed_domains) == wanted
        if not as_wanted or (has and has.injection_rules and not self._own.inject_credential):
            await sandbox.update(network_policy=self.policy())

    async def brief(self, sandbox: Sandbox, stdin: bytes) -> bytes:
        """The job as this sandbox may have it. With VERCEL_INJECT_CREDENTIAL its token goes to the firewall instead,
        which adds it where the session's own paths are asked for."""
        job = json.loads(stdin) if self._own.inject_credential else {}
        token = sessions_token(job.get("ANTHROPIC_WORK_SECRET"))
        if token is None:
            return stdin
        session, environment, work = (job[f"ANTHROPIC_{name}_ID"] for name in ("SESSION", "ENVIRONMENT", "WORK"))
        base = re.escape(urlsplit(self._settings.base_url).path)
        own = f"sessions/{session}|environments/{environment}/work/{work}|skills|memory_stores"
        rule = NetworkPolicyRule(
            match=NetworkPolicyRequestMatcher(path=NetworkPolicyMatcher.regex(f"^{base}/v1/({own})(/.*)?$")),
            transform=[NetworkPolicyTransform(headers={"authorization": f"Bearer {token}"})],
        )
        await sandbox.update(network_policy=self.policy((rule,)))
        return json.dumps(job | {"ANTHROPIC_WORK_SECRET": _NO_SECRET}).encode()
