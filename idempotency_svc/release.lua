-- Gives each key back, in order, if its item's nonce owns it, or whoever does if it is forced; the record stays with its
-- fingerprints and its time to live. Who waits for the key is given a sign.
-- ARGV[1], item by item: nonce 16 · forced 1.
-- Answers one byte for each item.

local DONE, ABSENT, FENCED, ALREADY = 1, 2, 3, 4

local outcomes = {}

for i, key in ipairs(KEYS) do
  local nonce, forced = struct.unpack('>c16B', ARGV[1], 17 * i - 16)
  local record, unreadable, failure = unpack_record(redis.pcall('GET', key))
  if failure then return failure end
  local outcome
  if not record then
    outcome = ABSENT
  elseif record.state == COMPLETED then
    outcome = ALREADY
  elseif forced == 0 and record.nonce ~= nonce then
    outcome = FENCED
  elseif record.state == RELEASED then
    outcome = ALREADY
  else
    redis.call('SETRANGE', key, 1, string.char(RELEASED))
    give_sign(key)
    outcome = DONE
  end
  outcomes[i] = string.char(outcome + unreadable)
end

return table.concat(outcomes)
