-- Lets the lease of each key end later, never earlier, in order, if its item's nonce owns it. The record lives at least as long.
-- ARGV[1], item by item: nonce 16 · lease_millis 4.
-- Answers one byte for each item.

local DONE, ABSENT, FENCED, ALREADY = 1, 2, 3, 4

local now = now_millis()
local outcomes, at = {}, 1

for i, key in ipairs(KEYS) do
  local nonce, lease
  nonce, lease, at = struct.unpack('>c16I4', ARGV[1], at)
  local record, unreadable, failure = unpack_record(redis.pcall('GET', key))
  if failure then return failure end
  local outcome
  if not record then
    outcome = ABSENT
  elseif record.state == COMPLETED then
    outcome = ALREADY
  elseif record.state == RELEASED or record.nonce ~= nonce then
    outcome = FENCED
  else
    redis.call('SETRANGE', key, record.lease_at, struct.pack('>I6', math.max(record.lease_until, now + lease)))
    redis.call('PEXPIRE', key, lease, 'GT')
    outcome = DONE
  end
  outcomes[i] = string.char(outcome + unreadable)
end

return table.concat(outcomes)
