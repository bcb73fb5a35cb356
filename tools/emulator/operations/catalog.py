"""The endpoints of environments and agents."""

from __future__ import annotations

from typing import Any

from .. import replies
from ..params import AgentCreateBody, EnvironmentCreateBody, EnvironmentUpdateBody, PageQuery
from ..requests import Call

Json = dict[str, Any]


async def create_environment(call: Call) -> Json:
    body = call.body(EnvironmentCreateBody)
    with call.engine.transact() as now:
        return replies.environment(call.world.create_environment(body, now))


async def list_environments(call: Call) -> Json:
    query = call.query(PageQuery)
    with call.engine.transact():
        items = [it for it in reversed(call.world.environments.values()) if it.archived_at is None]
        shown, next_page = replies.page(items, lambda it: it.id, query.limit, query.page)
        return {"data": [replies.environment(it) for it in shown], "next_page": next_page}


async def get_environment(call: Call) -> Json:
    call.no_query()
    with call.engine.transact():
        return replies.environment(call.world.environment(call.path["environment_id"]))


async def update_environment(call: Call) -> Json:
    body = call.body(EnvironmentUpdateBody)
    with call.engine.transact() as now:
        environment = call.world.environment(call.path["environment_id"])
        environment.update(body, now)
        return replies.environment(environment)


async def archive_environment(call: Call) -> Json:
    call.no_body()
    with call.engine.transact() as now:
        environment = call.world.environment(call.path["environment_id"])
        environment.archive(now)
        return replies.environment(environment)


async def create_agent(call: Call) -> Json:
    body = call.body(AgentCreateBody)
    with call.engine.transact() as now:
        return replies.agent(call.world.create_agent(body, now))


async def list_agents(call: Call) -> Json:
    query = call.query(PageQuery)
    with call.engine.transact():
        items = list(reversed(call.world.agents.values()))
        shown, next_page = replies.page(items, lambda it: it.id, query.limit, query.page)
        return {"data": [replies.agent(it) for it in shown], "next_page": next_page}


async def get_agent(call: Call) -> Json:
    call.no_query()
    with call.engine.transact():
        return replies.agent(call.world.agent(call.path["agent_id"]))
