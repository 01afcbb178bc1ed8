-- Gives each key back, in order, if its item's nonce owns it; the record stays with its fingerprints and its time to live.
-- ARGV[1], item by item: nonce 16.
-- Answers one byte for each item.

local DONE, ABSENT, FENCED, ALREADY = 1, 2, 3, 4

local outcomes = {}

for i, key in ipairs(KEYS) do
  local nonce = string.sub(ARGV[1], 16 * i - 15, 16 * i)
  local record, unreadable, failure = unpack_record(redis.pcall('GET', key))
  if failure then return failure end
  local outcome
  if not record then
    outcome = ABSENT
  elseif record.state == COMPLETED then
    outcome = ALREADY
  elseif record.nonce ~= nonce then
    outcome = FENCED
  elseif record.state == RELEASED then
    outcome = ALREADY
  else
    redis.call('SETRANGE', key, 1, string.char(RELEASED))
    outcome = DONE
  end
  outcomes[i] = string.char(outcome + unreadable)
end

return table.concat(outcomes)
