-- Puts the answer of each item into its record, in order. A durable answer is committed in the database, which has
-- decided: it is looked at before owner and fingerprint, and gives way to nothing but an earlier durable one. Not even to
-- that one if its timeline is higher: then a failover lost what the earlier one was about.
-- Who waits for the key is given a sign.
-- ARGV[1], item by item: nonce 16 · ttl_millis 4 · flags 1 · code 1 · kinds 1 · tail length 4 · fingerprints · tail.
-- Answers one byte for each item.

local DONE, RESTORED, ALREADY, FENCED, MISMATCH = 1, 2, 3, 4, 5

local items = ARGV[1]
local outcomes, at = {}, 1

for i, key in ipairs(KEYS) do
  local nonce, ttl, flags, code, kinds, length
  nonce, ttl, flags, code, kinds, length, at = struct.unpack('>c16I4BBBI4', items, at)
  local fingerprints = string.sub(items, at, at + FINGERPRINT * kinds - 1)
  at = at + FINGERPRINT * kinds
  local tail = string.sub(items, at, at + length - 1)
  at = at + length

  local record, unreadable, failure = unpack_record(redis.pcall('GET', key))
  if failure then return failure end
  local owner = record and record.state == IN_PROGRESS and record.nonce == nonce
  local same = record and same_request(record.fingerprints, fingerprints)
  local outcome
  if bit.band(flags, DURABLE) ~= 0 then
    local settled = record and record.state == COMPLETED and record.durable and (record.code == 0 or code ~= 0)
      and timeline_of(flags, tail) <= timeline_of(record.flags, record.tail)
    outcome = settled and (same and ALREADY or MISMATCH) or owner and DONE or RESTORED
  elseif record and not same then
    outcome = MISMATCH
  elseif record and record.state == COMPLETED then
    outcome = ALREADY
  else
    outcome = owner and DONE or FENCED
  end
  if outcome == DONE or outcome == RESTORED then
    redis.call('SET', key, pack(COMPLETED, flags, code, record and record.epoch or 1, fingerprints, tail), 'PX', ttl)
    if record and record.state == IN_PROGRESS then give_sign(key) end
  end
  outcomes[i] = string.char(outcome + unreadable)
end

return table.concat(outcomes)
