"""SessionService: requests become commands and reads, sessions become answers."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from controller_svc import convert
from controller_svc.core.sessions import session_not_found
from orchestrator.controller.v1 import session_service_pb2 as pb

if TYPE_CHECKING:
    from controller_svc.core.mutations import Mutation
    from controller_svc.core.sessions import ChangeSession, SessionMutations, SessionStore
    from controller_svc.mutation import Door
    from controller_svc.pages import PageTokens
    from svckit.interceptors import Call


class SessionServicer:
    """Implements orchestrator.controller.v1.SessionService."""

    def __init__(self, door: Door, store: SessionStore, mutations: SessionMutations, pages: PageTokens) -> None:
        self._door = door
        self._store = store
        self._mutations = mutations
        self._pages = pages

    async def CreateSession(self, request: pb.CreateSessionRequest, call: Call) -> bytes:
        """Open a session in a role that the caller holds."""
        command = convert.create_session(request, convert.actor_of(call.principal))
        command.actor.require(command.agent_role)
        answer = convert.session_answer(pb.CreateSessionResponse, request.metadata)
        structs = {"metadata": command.metadata}
        return await self._door.write(self._mutations.create, command, call, answer, structs)

    async def GetSession(self, request: pb.GetSessionRequest, call: Call) -> bytes:
        """Read one session."""
        session_id = convert.session_id(request)
        session = await self._store.get(call.principal.tenant, session_id)
        if session is None:
            raise session_not_found(session_id)
        return convert.session_answer(pb.GetSessionResponse)(session)

    async def ListSessions(self, request: pb.ListSessionsRequest, call: Call) -> bytes:
        """Read a page of sessions, newest first."""
        tenant, filters = call.principal.tenant, convert.session_filters(request)
        page = self._pages.page(request, tenant, call.policy.full_method, filters.values())
        before = UUID(page.after) if page.after else None
        sessions = await self._store.list(tenant, **filters, before=before, limit=page.size + 1)
        response = pb.ListSessionsResponse(next_page_token=page.next_token(sessions))
        for session in sessions[: page.size]:
            convert.fill_session(response.sessions.add(), session)
        if request.include_total_size:
            response.total_size = await self._store.count(tenant, **filters)
        return response.SerializeToString()

    async def UpdateSession(self, request: pb.UpdateSessionRequest, call: Call) -> bytes:
        """Change what the mask names."""
        command = convert.update_session(request, convert.actor_of(call.principal))
        answer = convert.session_answer(pb.UpdateSessionResponse)
        structs = {"metadata": command.metadata}
        return await self._door.write(self._mutations.update, command, call, answer, structs)

    async def ActivateSession(self, request: pb.ActivateSessionRequest, call: Call) -> bytes:
        """Move PENDING to ACTIVE."""
        return await self._change(self._mutations.activate, request, call, pb.ActivateSessionResponse)

    async def PauseSession(self, request: pb.PauseSessionRequest, call: Call) -> bytes:
        """Move ACTIVE to PAUSED."""
        return await self._change(self._mutations.pause, request, call, pb.PauseSessionResponse)

    async def ResumeSession(self, request: pb.ResumeSessionRequest, call: Call) -> bytes:
        """Move PAUSED to ACTIVE."""
        return await self._change(self._mutations.resume, request, call, pb.ResumeSessionResponse)

    async def CompleteSession(self, request: pb.CompleteSessionRequest, call: Call) -> bytes:
        """Move ACTIVE to COMPLETED."""
        return await self._change(self._mutations.complete, request, call, pb.CompleteSessionResponse)

    async def FailSession(self, request: pb.FailSessionRequest, call: Call) -> bytes:
        """Move ACTIVE to FAILED."""
        return await self._change(self._mutations.fail, request, call, pb.FailSessionResponse)

    async def _change(
        self,
        mutation: Mutation[ChangeSession],
        request: convert.ChangeSessionRequest,
        call: Call,
        response: type[convert.SessionResponse],
    ) -> bytes:
        command = convert.change_session(request, convert.actor_of(call.principal))
        return await self._door.write(mutation, command, call, convert.session_answer(response))
