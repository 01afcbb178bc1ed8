-- Sessions, tasks, their audit trail, and the guards that make every write take effect once.
--
-- Every key starts with the tenant. Text that is compared or indexed has collation "C": its order is that of its bytes, the
-- same on every server, and cheaper. Ids and times are made by the writer; an index is there for each filter of a list, for
-- the claim and for each sweep, and for nothing else.

create table sessions (
    tenant       text        collate "C" not null,
    id           uuid        not null,
    version      bigint      not null,
    agent_role   text        collate "C" not null,
    state        text        collate "C" not null,
    task_id      uuid,
    metadata     jsonb       not null,
    create_time  timestamptz not null,
    update_time  timestamptz not null,
    expire_time  timestamptz not null,
    start_time   timestamptz,
    pause_time   timestamptz,
    end_time     timestamptz,

    constraint sessions_pkey primary key (tenant, id),
    constraint sessions_tenant_check check (length(tenant) between 1 and 255),
    constraint sessions_version_check check (version >= 1),
    constraint sessions_agent_role_check check (length(agent_role) between 1 and 64),
    constraint sessions_state_check
        check (state in ('PENDING', 'ACTIVE', 'PAUSED', 'COMPLETED', 'FAILED', 'EXPIRED')),
    constraint sessions_metadata_check check (jsonb_typeof(metadata) = 'object'),
    constraint sessions_update_time_check check (update_time >= create_time),
    -- One that was never ACTIVE can only expire.
    constraint sessions_start_time_check check (state = 'EXPIRED' or (start_time is null) = (state = 'PENDING')),
    constraint sessions_pause_time_check check (state <> 'PAUSED' or pause_time is not null),
    constraint sessions_end_time_check
        check ((end_time is not null) = (state in ('COMPLETED', 'FAILED', 'EXPIRED')))
) with (autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.02);

create index sessions_agent_role_idx on sessions (tenant, agent_role, id);
create index sessions_state_idx on sessions (tenant, state, id);
create index sessions_task_id_idx on sessions (tenant, task_id, id) where task_id is not null;
create index sessions_expire_time_idx on sessions (expire_time) where end_time is null;
create index sessions_end_time_idx on sessions (end_time) where end_time is not null;

comment on table sessions is 'An agent''s span of work.';
comment on column sessions.version is 'The etag. 1 when created; each change adds one.';
comment on column sessions.agent_role is 'The role whose holders may change it.';
comment on column sessions.task_id is 'The task it works on. No foreign key: that a task exists is asked when it is set.';
comment on column sessions.metadata is 'At most 16 KiB as compact JSON.';
comment on column sessions.expire_time is 'When the sweeper expires it, if nothing changes before and no task is unfinished.';
comment on column sessions.start_time is 'When it was first activated.';
comment on column sessions.pause_time is 'When it was last paused.';
comment on column sessions.end_time is 'Set exactly when it is COMPLETED, FAILED or EXPIRED.';
comment on index sessions_pkey is 'Get; the list without a filter.';
comment on index sessions_agent_role_idx is 'List by agent_role.';
comment on index sessions_state_idx is 'List by state.';
comment on index sessions_task_id_idx is 'List by task_id.';
comment on index sessions_expire_time_idx is 'The sweep of idle sessions.';
comment on index sessions_end_time_idx is 'The sweep for tasks of sessions that ended just now.';

create view active_sessions as
    select tenant, id, agent_role, task_id, metadata, create_time, update_time, expire_time, start_time
    from sessions
    where state = 'ACTIVE';

comment on view active_sessions is 'Sessions that are ACTIVE, for people and dashboards; the services do not read it.';

create table tasks (
    tenant             text        collate "C" not null,
    id                 uuid        not null,
    version            bigint      not null,
    beat               bigint      not null,
    session_id         uuid        not null,
    type               text        collate "C" not null,
    from_role          text        collate "C" not null,
    target_role        text        collate "C" not null,
    description        text        not null,
    data               jsonb       not null,
    context            jsonb       not null,
    trace_id           text        not null,
    priority           int         not null,
    schedule_time      timestamptz not null,
    attempt            int         not null,
    max_attempts       int         not null,
    retry_backoff_us   bigint      not null,
    lease_timeout_us   bigint      not null,
    attempt_timeout_us bigint,
    state              text        collate "C" not null,
    result             jsonb,
    error              jsonb,
    progress           jsonb,
    lease_id           uuid,
    lease_holder       text        not null,
    lease_expire_time  timestamptz,
    create_time        timestamptz not null,
    update_time        timestamptz not null,
    start_time         timestamptz,
    end_time           timestamptz,
    xid                xid8        not null default pg_current_xact_id(),

    constraint tasks_pkey primary key (tenant, id),
    constraint tasks_session_id_fkey foreign key (tenant, session_id) references sessions (tenant, id),
    constraint tasks_version_check check (version >= 1),
    constraint tasks_beat_check check (beat >= 0),
    constraint tasks_type_check check (length(type) between 1 and 63),
    constraint tasks_from_role_check check (length(from_role) between 1 and 64),
    constraint tasks_target_role_check check (length(target_role) between 1 and 64),
    constraint tasks_description_check check (length(description) <= 4096),
    constraint tasks_data_check check (jsonb_typeof(data) = 'object'),
    constraint tasks_context_check check (jsonb_typeof(context) = 'object'),
    constraint tasks_priority_check check (priority between -100 and 100),
    constraint tasks_attempt_check
        check (attempt between 0 and max_attempts and (state <> 'PENDING' or attempt < max_attempts)),
    constraint tasks_max_attempts_check check (max_attempts between 1 and 100),
    constraint tasks_retry_backoff_check check (retry_backoff_us between 0 and 3600000000),
    constraint tasks_lease_timeout_check check (lease_timeout_us between 1000000 and 3600000000),
    constraint tasks_attempt_timeout_check check (attempt_timeout_us between 1000000 and 86400000000),
    constraint tasks_state_check
        check (state in ('PENDING', 'BLOCKED', 'RUNNING', 'SUCCEEDED', 'DEAD', 'CANCELLED')),
    constraint tasks_result_check
        check ((result is not null) = (state = 'SUCCEEDED') and (result is null or jsonb_typeof(result) = 'object')),
    constraint tasks_error_check check (error ?& array['code', 'message', 'non_retryable']),
    constraint tasks_progress_check check (jsonb_typeof(progress) = 'object'),
    -- A lease is held exactly while the task is RUNNING; its name and holder stay, to recognise who comes late.
    constraint tasks_lease_check
        check ((lease_expire_time is not null) = (state = 'RUNNING') and (state <> 'RUNNING' or lease_id is not null)),
    constraint tasks_lease_holder_check
        check ((lease_id is not null) = (lease_holder <> '') and (lease_id is null or start_time is not null)),
    constraint tasks_update_time_check check (update_time >= create_time),
    constraint tasks_end_time_check
        check ((end_time is not null) = (state in ('SUCCEEDED', 'DEAD', 'CANCELLED')))
-- Room in each page, so that a heartbeat's new row version stays in it and touches no index.
) with (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);

create index tasks_session_id_idx on tasks (tenant, session_id, id);
create index tasks_target_role_idx on tasks (tenant, target_role, id);
create index tasks_state_idx on tasks (tenant, state, id);
create index tasks_type_idx on tasks (tenant, type, id);
create index tasks_claim_idx on tasks (tenant, target_role, priority desc, schedule_time, id) where state = 'PENDING';
create index tasks_unfinished_idx on tasks (tenant, session_id, id) where state in ('PENDING', 'BLOCKED', 'RUNNING');
-- Not by lease_expire_time: each heartbeat moves it, and would have to write to every index of the table.
create index tasks_running_idx on tasks (tenant, id) where state = 'RUNNING';

comment on table tasks is 'Work routed to a role, and the lease of the worker that runs it.';
comment on column tasks.version is 'The etag. 1 when created; each change but a heartbeat adds one.';
comment on column tasks.beat is 'Counts heartbeats; with version it tells whether the row is as it was read.';
comment on column tasks.from_role is 'The agent_role of its session.';
comment on column tasks.trace_id is 'W3C trace id of the call that routed it.';
comment on column tasks.priority is 'The higher is handed out first.';
comment on column tasks.schedule_time is 'Not handed out before.';
comment on column tasks.attempt is 'Attempts used, the running one included.';
comment on column tasks.retry_backoff_us is 'Microseconds. Delay after the first failed attempt; doubles up to an hour.';
comment on column tasks.lease_timeout_us is 'Microseconds. How long a claim or a heartbeat keeps the lease.';
comment on column tasks.attempt_timeout_us is 'Microseconds. No heartbeat keeps the lease beyond start_time plus this.';
comment on column tasks.result is 'Set exactly when it is SUCCEEDED.';
comment on column tasks.error is 'Of the last attempt that failed, or why it is DEAD or CANCELLED: code, message, non_retryable.';
comment on column tasks.progress is 'What a heartbeat said last.';
comment on column tasks.lease_id is 'Names the last lease, also after its end.';
comment on column tasks.lease_holder is 'The subject that claimed the last lease; empty before the first.';
comment on column tasks.lease_expire_time is 'Set exactly while it is RUNNING.';
comment on column tasks.start_time is 'When it was last claimed.';
comment on column tasks.end_time is 'Set exactly when it is SUCCEEDED, DEAD or CANCELLED.';
comment on column tasks.xid is 'Transaction of the last change, heartbeats apart: a claim''s audit event has at least this one.';
comment on index tasks_pkey is 'Get; the list without a filter.';
comment on index tasks_session_id_idx is 'List by session_id.';
comment on index tasks_target_role_idx is 'List by target_role.';
comment on index tasks_state_idx is 'List by state.';
comment on index tasks_type_idx is 'List by type.';
comment on index tasks_claim_idx is 'The claim.';
comment on index tasks_unfinished_idx is 'Whether a session has unfinished tasks; the sweeps for tasks of ended sessions.';
comment on index tasks_running_idx is 'The sweep of lost leases, which reads all of it.';

create table audit_events (
    tenant         text        collate "C" not null,
    id             bigint      generated always as identity,
    create_time    timestamptz not null default clock_timestamp(),
    xid            xid8        not null default pg_current_xact_id(),
    method         text        collate "C" not null,
    resource_type  text        not null,
    resource_id    uuid        not null,
    version_before bigint      not null,
    version_after  bigint      not null,
    state_before   text        not null,
    state_after    text        not null,
    subject        text        collate "C" not null,
    role           text        not null,
    on_behalf_of   text        not null,
    trace_id       text        not null,
    key_hash       bytea,
    command_id     uuid        not null,

    constraint audit_events_pkey primary key (tenant, id),
    constraint audit_events_command_key unique (tenant, resource_id, command_id),
    constraint audit_events_resource_type_check check (resource_type in ('session', 'task')),
    constraint audit_events_version_check check (version_before >= 0 and version_after = version_before + 1),
    constraint audit_events_state_check check (state_after <> '' and (state_before = '') = (version_before = 0))
) with (autovacuum_analyze_scale_factor = 0.02);

create index audit_events_create_time_idx on audit_events (tenant, create_time, id);
create index audit_events_resource_id_idx on audit_events (tenant, resource_id, create_time, id);
create index audit_events_method_idx on audit_events (tenant, method, create_time, id);
create index audit_events_subject_idx on audit_events (tenant, subject, create_time, id);

comment on table audit_events is 'One row per change of a resource, written with it. Append-only.';
comment on column audit_events.xid is 'Transaction that wrote it, or of the resource''s change before, if later: orders events across resources.';
comment on column audit_events.method is 'Full name of the RPC, or of the sweep.';
comment on column audit_events.version_before is '0 for a creation.';
comment on column audit_events.state_before is 'Empty for a creation.';
comment on column audit_events.role is 'The agent role that the subject acted in; empty if in none.';
comment on column audit_events.on_behalf_of is 'For whom the subject acted, by its token.';
comment on column audit_events.trace_id is 'W3C trace id of the call.';
comment on column audit_events.key_hash is 'Hash of the idempotency key; null without one.';
comment on column audit_events.command_id is 'The command; the guard of the same command has the same one.';
comment on index audit_events_pkey is 'Where a page goes on.';
comment on index audit_events_command_key is 'A command that would be run twice fails here, whatever else goes wrong.';
comment on index audit_events_create_time_idx is 'The list without a filter, or of a span of time.';
comment on index audit_events_resource_id_idx is 'List by resource_id, and of a span of time.';
comment on index audit_events_method_idx is 'List by method, and of a span of time.';
comment on index audit_events_subject_idx is 'List by subject, and of a span of time.';

create function audit_events_append_only() returns trigger language plpgsql as $$
begin
    raise exception 'audit_events is append-only' using errcode = 'restrict_violation', constraint = 'audit_events_append_only';
end
$$;

create trigger audit_events_append_only before update or delete or truncate on audit_events
    for each statement execute function audit_events_append_only();

create table idempotency_guards (
    tenant      text        collate "C" not null,
    scope       bytea       not null,
    command_id  uuid        not null,
    fingerprint bytea       not null,
    code        int         not null,
    answer      bytea       not null,
    create_time timestamptz not null,
    expire_time timestamptz not null,

    constraint idempotency_guards_pkey primary key (tenant, scope),
    constraint idempotency_guards_scope_check check (length(scope) = 32),
    constraint idempotency_guards_fingerprint_check check (length(fingerprint) = 32),
    constraint idempotency_guards_code_check check (code between 0 and 16),
    constraint idempotency_guards_expire_time_check check (expire_time > create_time)
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.1);

create index idempotency_guards_expire_time_idx on idempotency_guards (expire_time);

comment on table idempotency_guards is 'What a command was answered, written with its effect; its scope cannot have another while it lives.';
comment on column idempotency_guards.scope is 'Hash of who called which method with which idempotency key; without a key, of the command alone.';
comment on column idempotency_guards.command_id is 'The command that won the scope.';
comment on column idempotency_guards.fingerprint is 'SHA-256 of the request, to recognise a key that is used for another one.';
comment on column idempotency_guards.code is 'gRPC status code of the answer; 0 is OK.';
comment on column idempotency_guards.answer is 'The response''s bytes; for an error, those of a google.rpc.Status.';
comment on column idempotency_guards.expire_time is 'From then on it counts as absent, and may be replaced or deleted.';
comment on index idempotency_guards_pkey is 'Reading and writing a guard.';
comment on index idempotency_guards_expire_time_idx is 'The purge.';
