-- Puts the answer of each item into its record, in order. A durable answer is committed in the database, which has
-- decided: it is looked at before owner and fingerprint, and gives way to nothing but an earlier durable one.
-- ARGV[1], item by item: nonce 16 · ttl_millis 4 · durable 1 · code 1 · kinds 1 · answer length 4 · fingerprints · answer.
-- Answers one byte for each item.

local DONE, RESTORED, ALREADY, FENCED, MISMATCH = 1, 2, 3, 4, 5

local items = ARGV[1]
local outcomes, at = {}, 1

for i, key in ipairs(KEYS) do
  local nonce, ttl, durable, code, kinds, length
  nonce, ttl, durable, code, kinds, length, at = struct.unpack('>c16I4BBBI4', items, at)
  local fingerprints = string.sub(items, at, at + FINGERPRINT * kinds - 1)
  at = at + FINGERPRINT * kinds
  local answer = string.sub(items, at, at + length - 1)
  at = at + length

  local record, unreadable, failure = unpack_record(redis.pcall('GET', key))
  if failure then return failure end
  local owner = record and record.state == IN_PROGRESS and record.nonce == nonce
  local same = record and same_request(record.fingerprints, fingerprints)
  local outcome
  if durable == DURABLE then
    local settled = record and record.state == COMPLETED and record.durable and (record.code == 0 or code ~= 0)
    outcome = settled and (same and ALREADY or MISMATCH) or owner and DONE or RESTORED
  elseif record and not same then
    outcome = MISMATCH
  elseif record and record.state == COMPLETED then
    outcome = ALREADY
  else
    outcome = owner and DONE or FENCED
  end
  if outcome == DONE or outcome == RESTORED then
    redis.call('SET', key, pack(COMPLETED, durable, code, record and record.epoch or 1, fingerprints, answer), 'PX', ttl)
  end
  outcomes[i] = string.char(outcome + unreadable)
end

return table.concat(outcomes)
