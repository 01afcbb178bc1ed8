-- Claims each key for its item's nonce, in order.
-- ARGV[1], item by item: lease_millis 4 · ttl_millis 4 · nonce 16 · kinds 1 · fingerprints.
-- ARGV[2]: how many bytes of answers, uncompressed, one reply may hold, in all; the first answer always fits. Who finds no
-- room is told BUSY for one millisecond, and asks again.
-- Answers, item by item: outcome 1 · number 4, and after REPLAY: code 1 · flags 1 · the record's tail, of `number` bytes.

local ACQUIRED, TAKEOVER, REPLAY, BUSY, MISMATCH = 1, 2, 3, 4, 5

local now = now_millis()
local items, limit = ARGV[1], tonumber(ARGV[2])
local outcomes, at, room = {}, 1, limit

for i, key in ipairs(KEYS) do
  local lease, ttl, nonce, kinds
  lease, ttl, nonce, kinds, at = struct.unpack('>I4I4c16B', items, at)
  local fingerprints = string.sub(items, at, at + FINGERPRINT * kinds - 1)
  at = at + FINGERPRINT * kinds
  local tail = struct.pack('>I6', now + lease) .. nonce
  local function own(epoch)
    epoch = math.min(epoch, 4294967295)
    redis.call('SET', key, pack(IN_PROGRESS, 0, 0, epoch, fingerprints, tail), 'PX', ttl)
    return epoch
  end

  -- The usual case, a key seen for the first time, costs one command.
  local found = redis.pcall('SET', key, pack(IN_PROGRESS, 0, 0, 1, fingerprints, tail), 'NX', 'GET', 'PX', ttl)
  local outcome, number, answer = ACQUIRED, 1, ''
  if found then
    local record, unreadable, failure = unpack_record(found)
    if failure then return failure end
    if not record then
      outcome, number = ACQUIRED + unreadable, own(1)
    elseif not same_request(record.fingerprints, fingerprints) then
      outcome, number = MISMATCH, record.durable and 1 or 0
    elseif record.state == COMPLETED then
      local size = answer_size_of(record.flags, record.tail)
      if size <= room or room == limit then
        outcome, number = REPLAY, #record.tail
        answer = struct.pack('>BB', record.code, record.flags) .. record.tail
        room = room - size
      else
        outcome, number = BUSY, 1
      end
    elseif record.state == RELEASED then
      number = own(record.epoch + 1)
    elseif record.nonce == nonce then
      number = own(record.epoch)
    elseif record.lease_until > now then
      outcome, number = BUSY, record.lease_until - now
    else
      outcome, number = TAKEOVER, own(record.epoch + 1)
    end
  end
  outcomes[i] = struct.pack('>BI4', outcome, number) .. answer
end

return table.concat(outcomes)
