-- A guard holds several kinds of fingerprints, packed: the kind in one byte, its digest in 32. Guards of before hold the
-- bare digest of kind 1.
alter table idempotency_guards
    drop constraint idempotency_guards_fingerprint_check,
    add constraint idempotency_guards_fingerprint_check
        check (length(fingerprint) = 32 or (length(fingerprint) % 33 = 0 and length(fingerprint) between 33 and 264));

comment on column idempotency_guards.fingerprint is
    'What the request was, to recognise a key that is used for another one: packed fingerprints, or a bare SHA-256 of before.';
