-- What the steps share; it is put before each of them. It knows the record, one packed STRING for each key:
--
--   format 1 · state 1 · flags 1 · code 1 · epoch 4 · kinds 1 · kinds × (kind 1, digest 32) · tail
--
-- Integers are big-endian. The tail of C (completed) is the answer, after its timeline 4 if that flag is set, and after
-- the size 4 that it has uncompressed if that flag is set; that of I (in progress) and of R (released) is lease_until 6
-- (milliseconds, this server's clock) · nonce 16. Bytes that are anything else, another format among them, count as an
-- absent record. What is new gets a flag rather than a format: records without it stay what they were.

local FORMAT = 1
local IN_PROGRESS, COMPLETED, RELEASED = 73, 67, 82 -- 'I', 'C', 'R'
-- Flags of C. OMITTED: the answer is in the caller's own truth alone. COMPRESSED: as a zlib stream, which is for others
-- to read.
local DURABLE, OMITTED, TIMELINE, COMPRESSED = 1, 2, 4, 8
local FLAGS = 15
local FINGERPRINT = 33
local UNREADABLE = 128 -- added to an outcome whose record was there, but was not one

local function now_millis()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function pack(state, flags, code, epoch, fingerprints, tail)
  return struct.pack('>BBBBI4B', FORMAT, state, flags, code, epoch, #fingerprints / FINGERPRINT) .. fingerprints .. tail
end

-- How many bytes of a completed record's tail are not the answer.
local function head_of(flags)
  return bit.band(flags, TIMELINE) + bit.band(flags, COMPRESSED) / 2 -- which is 4 for each
end

-- The timeline in the tail of a completed record, 0 without one.
local function timeline_of(flags, tail)
  return bit.band(flags, TIMELINE) == 0 and 0 or struct.unpack('>I4', tail)
end

-- How many bytes the answer in the tail of a completed record has uncompressed.
local function answer_size_of(flags, tail)
  local head = head_of(flags)
  return bit.band(flags, COMPRESSED) == 0 and #tail - head or struct.unpack('>I4', tail, head - 3)
end

-- What GET answered → the record as a table; or nil and why: 0 (absent) or UNREADABLE. A third value is an error that
-- the script must return as it is.
local function unpack_record(found)
  if not found then return nil, 0 end
  if type(found) == 'table' then
    if string.sub(found.err or '', 1, 9) == 'WRONGTYPE' then return nil, UNREADABLE end
    return nil, 0, found
  end
  if #found < 9 then return nil, UNREADABLE end
  local format, state, flags, code, epoch, kinds = struct.unpack('>BBBBI4B', found)
  local tail = 10 + FINGERPRINT * kinds
  local left = #found - tail + 1
  if format ~= FORMAT or flags > FLAGS or kinds == 0 or left < 0 then return nil, UNREADABLE end
  local record = {
    state = state, flags = flags, durable = bit.band(flags, DURABLE) ~= 0, code = code, epoch = epoch,
    fingerprints = string.sub(found, 10, tail - 1),
  }
  if state == COMPLETED then
    if left < head_of(flags) then return nil, UNREADABLE end
    record.tail = string.sub(found, tail)
  elseif (state == IN_PROGRESS or state == RELEASED) and left == 22 then
    record.lease_until, record.nonce = struct.unpack('>I6c16', found, tail)
    record.lease_at = tail - 1 -- for SETRANGE, which counts from 0
  else
    return nil, UNREADABLE
  end
  return record, 0
end

-- Tells who waits for a record in progress that it is no longer; the channel is called as its key. A user without the
-- right to publish gives no signs: who waits looks by itself as well.
local function give_sign(key)
  redis.pcall('SPUBLISH', key, '')
end

-- Equal when any kind present on both sides is equal; without a common kind nothing says that they are equal.
local function same_request(ours, theirs)
  if ours == theirs then return true end
  for i = 1, #ours, FINGERPRINT do
    local one = string.sub(ours, i, i + FINGERPRINT - 1)
    for j = 1, #theirs, FINGERPRINT do
      if one == string.sub(theirs, j, j + FINGERPRINT - 1) then return true end
    end
  end
  return false
end
