-- Tells of each key's record, in order, all but its answer and its owner's nonce.
-- Answers, item by item: state 1 (0: absent) · flags 1 · code 1 · epoch 4 · lease left 4 · time to live left 4 (milliseconds) ·
-- timeline 4 · bytes of the answer 4 · kinds 1 · each kind 1.

local now = now_millis()
local outcomes = {}

for i, key in ipairs(KEYS) do
  local record, unreadable, failure = unpack_record(redis.pcall('GET', key))
  if failure then return failure end
  if not record then
    outcomes[i] = string.char(unreadable)
  else
    local completed = record.state == COMPLETED
    local kinds = {}
    for at = 1, #record.fingerprints, FINGERPRINT do
      kinds[#kinds + 1] = string.sub(record.fingerprints, at, at)
    end
    outcomes[i] = struct.pack('>BBBI4I4I4I4I4B', record.state, record.flags, record.code, record.epoch,
      record.state == IN_PROGRESS and math.max(record.lease_until - now, 0) or 0, math.max(redis.call('PTTL', key), 0),
      completed and timeline_of(record.flags, record.tail) or 0,
      completed and answer_size_of(record.flags, record.tail) or 0, #kinds) .. table.concat(kinds)
  end
end

return table.concat(outcomes)
