"""TaskService: requests become commands, claims and reads, tasks become answers."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from controller_svc import convert
from controller_svc.core.sessions import task_not_found
from orchestrator.controller.v1 import task_service_pb2 as pb

if TYPE_CHECKING:
    from controller_svc.claims import Claims
    from controller_svc.core.tasks import HeartbeatStore, TaskMutations, TaskStore
    from controller_svc.mutation import Door
    from controller_svc.pages import PageTokens
    from svckit.interceptors import Call


class TaskServicer:
    """Implements orchestrator.controller.v1.TaskService."""

    def __init__(
        self,
        door: Door,
        store: TaskStore,
        mutations: TaskMutations,
        pages: PageTokens,
        *,
        claims: Claims,
        heartbeats: HeartbeatStore,
    ) -> None:
        self._door = door
        self._store = store
        self._mutations = mutations
        self._pages = pages
        self._claims = claims
        self._heartbeats = heartbeats

    async def RouteTask(self, request: pb.RouteTaskRequest, call: Call) -> bytes:
        """Hand a new task of a session to a role."""
        command = convert.route_task(request, convert.actor_of(call.principal), call.trace.trace_id)
        answer = convert.task_answer(pb.RouteTaskResponse)
        structs = {"data": command.data, "context": command.context}
        return await self._door.write(self._mutations.route, command, call, answer, structs)

    async def GetTask(self, request: pb.GetTaskRequest, call: Call) -> bytes:
        """Read one task."""
        task_id = convert.task_id(request)
        task = await self._store.get(call.principal.tenant, task_id)
        if task is None:
            raise task_not_found(task_id)
        return convert.task_answer(pb.GetTaskResponse)(task)

    async def ListTasks(self, request: pb.ListTasksRequest, call: Call) -> bytes:
        """Read a page of tasks, newest first."""
        tenant, filters = call.principal.tenant, convert.task_filters(request)
        page = self._pages.page(request, tenant, call.policy.full_method, filters.values())
        before = UUID(page.after) if page.after else None
        tasks = await self._store.list(tenant, **filters, before=before, limit=page.size + 1)
        response = pb.ListTasksResponse(next_page_token=page.next_token(tasks))
        for task in tasks[: page.size]:
            convert.fill_task(response.tasks.add(), task)
        if request.include_total_size:
            response.total_size = await self._store.count(tenant, **filters)
        return response.SerializeToString()

    async def CancelTask(self, request: pb.CancelTaskRequest, call: Call) -> bytes:
        """End an unfinished task."""
        command = convert.cancel_task(request, convert.actor_of(call.principal))
        answer = convert.task_answer(pb.CancelTaskResponse)
        return await self._door.write(self._mutations.cancel, command, call, answer)

    async def ClaimTasks(self, request: pb.ClaimTasksRequest, call: Call) -> bytes:
        """Lease tasks of a role that the caller holds."""
        command = convert.claim_tasks(request, convert.actor_of(call.principal))
        command.actor.require(command.role)
        return await self._claims.claim(command, call, convert.claim_answer)

    async def HeartbeatTask(self, request: pb.HeartbeatTaskRequest, call: Call) -> bytes:
        """Keep a lease."""
        task_id, lease_id = convert.task_id(request), convert.lease_id(request)
        progress, principal = convert.progress(request), call.principal
        kept = await self._heartbeats.beat(principal.tenant, task_id, lease_id, principal.subject, progress)
        return convert.heartbeat_answer(kept)

    async def CompleteTask(self, request: pb.CompleteTaskRequest, call: Call) -> bytes:
        """End a leased task with its result."""
        command = convert.complete_task(request, convert.actor_of(call.principal))
        answer = convert.task_answer(pb.CompleteTaskResponse)
        structs = {"result": command.result}
        return await self._door.write(self._mutations.complete, command, call, answer, structs)

    async def FailTask(self, request: pb.FailTaskRequest, call: Call) -> bytes:
        """End a leased attempt with an error."""
        command = convert.fail_task(request, convert.actor_of(call.principal))
        return await self._door.write(self._mutations.fail, command, call, convert.task_answer(pb.FailTaskResponse))

    async def ReleaseTask(self, request: pb.ReleaseTaskRequest, call: Call) -> bytes:
        """Give a leased task back."""
        command = convert.release_task(request, convert.actor_of(call.principal))
        answer = convert.task_answer(pb.ReleaseTaskResponse)
        return await self._door.write(self._mutations.release, command, call, answer)
