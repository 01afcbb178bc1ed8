-- What one CreateSession writes, for pgbench: the statement of controller_svc/store/write.py for a group of one new session,
-- with values made here instead of parameters.
with one as materialized (
  select 'pgbench'::text as tenant, sha256(uuid_send(gen_random_uuid())) as scope, gen_random_uuid() as command_id,
    sha256('request') as fingerprint, decode(repeat('5a', 280), 'hex') as answer, now() + interval '30 seconds' as not_after,
    -- Version 7, as the controller makes them: new rows go to the end of the index.
    (lpad(to_hex((extract(epoch from clock_timestamp()) * 1000)::bigint), 12, '0')
      || '7' || substr(replace(gen_random_uuid()::text, '-', ''), 14))::uuid as id
), c as materialized (
  select one.*, pg_try_advisory_xact_lock(('x' || encode(substr(scope, 1, 8), 'hex'))::bit(64)::bigint) as locked,
    clock_timestamp() < not_after as live
  from one
), ready as materialized (
  select * from c where locked and live
), g as (
  insert into idempotency_guards as k (tenant, scope, command_id, fingerprint, code, answer, create_time, expire_time)
  select tenant, scope, command_id, fingerprint, 0, answer, clock_timestamp(), clock_timestamp() + interval '48 hours'
  from ready
  on conflict (tenant, scope) do update set command_id = excluded.command_id, fingerprint = excluded.fingerprint,
    code = excluded.code, answer = excluded.answer, create_time = excluded.create_time, expire_time = excluded.expire_time
  where k.expire_time <= clock_timestamp()
  returning k.command_id
), won as materialized (
  select ready.* from ready join g using (command_id)
), created as (
  insert into sessions (tenant, id, version, agent_role, state, metadata, create_time, update_time, expire_time)
  select tenant, id, 1, 'planner', 'PENDING',
    '{"goal": "Summarise the incident reports of the last week.", "model": "large-3", "budget": {"tokens": 20000,
      "seconds": 120}, "labels": ["incident", "weekly"]}'::jsonb,
    now(), now(), now() + interval '7 days'
  from won
), audited as (
  insert into audit_events (tenant, method, resource_type, resource_id, version_before, version_after, state_before,
    state_after, subject, role, on_behalf_of, trace_id, key_hash, command_id)
  select tenant, '/orchestrator.controller.v1.SessionService/CreateSession', 'session', id, 0, 1, '', 'PENDING', 'load',
    'planner', '', '4bf92f3577b34da6a3ce929d0e0e4736', sha256('key'), command_id
  from won
)
select c.locked, c.live, ready.command_id is not null, won.command_id is not null, clock_timestamp()
from c left join ready using (command_id) left join won using (command_id);
