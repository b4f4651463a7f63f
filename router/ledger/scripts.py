"""The ledger's operations inside Redis: one Lua script each, all over one prelude.

State of a scope, four keys in one slot (every key of a ledger carries one hash tag):

    state    hash: now, newest (sub-window), spent, student, reserved, total_spent, total_student,
             and s<i>, t<i>: teacher and student tokens of sub-window i
    held     hash: lease id -> tokens; 0 for one that was given up
    leases   sorted set of lease ids by the ms at which they expire
    lapsed   sorted set of expired lease ids, with the same scores, and of those that were given up

`router.ledger.account.Account` is the same in Python, with the reasons. The time is Redis's own.
"""

from hashlib import sha1

from router.ledger.base import PARTS, SUB_WINDOWS

PRELUDE = f"local SUB_WINDOWS, PARTS = {SUB_WINDOWS}, {PARTS}"
PRELUDE += """
local TOTALS = {'now', 'newest', 'spent', 'student', 'reserved', 'total_spent', 'total_student'}
local call = redis.call

local now = tonumber(ARGV[1])
if not now then
  local t = call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local charge_expired = ARGV[2] == 'charge'
local lease_ms = tonumber(ARGV[3])

local function charge(a, sub_window, tokens)
  a.total_spent = a.total_spent + tokens
  if sub_window >= a.newest - SUB_WINDOWS then
    call('HINCRBY', a.state, 's' .. sub_window, tokens)
    a.spent = a.spent + tokens
  end
end

local function roll(a, newest)
  a.newest, a.rolled = newest, true
  local oldest, gone = newest - SUB_WINDOWS, {}
  local fields = call('HGETALL', a.state)
  for i = 1, #fields, 2 do
    local kind, sub_window = string.match(fields[i], '^([st])(%d+)$')
    if kind and tonumber(sub_window) < oldest then
      gone[#gone + 1] = fields[i]
      local total = kind == 's' and 'spent' or 'student'
      a[total] = a[total] - tonumber(fields[i + 1])
    end
  end
  if #gone > 0 then call('HDEL', a.state, unpack(gone)) end
  for _, id in ipairs(call('ZRANGEBYSCORE', a.lapsed, '-inf', '(' .. oldest * a.width)) do
    call('ZREM', a.lapsed, id)
    call('HDEL', a.held, id)
  end
end

-- The account of the i-th scope as of now.
local function account(i, window)
  local k = 4 * (i - 1)
  local a = {state = KEYS[k + 1], held = KEYS[k + 2], leases = KEYS[k + 3], lapsed = KEYS[k + 4]}
  local values = call('HMGET', a.state, unpack(TOTALS))
  for j, name in ipairs(TOTALS) do a[name] = tonumber(values[j]) or 0 end
  a.window = window
  a.width = math.ceil(window / SUB_WINDOWS)
  a.now = math.max(a.now, now)
  for _, id in ipairs(call('ZRANGEBYSCORE', a.leases, '-inf', a.now)) do
    local tokens, expires = tonumber(call('HGET', a.held, id)), tonumber(call('ZSCORE', a.leases, id))
    call('ZREM', a.leases, id)
    call('ZADD', a.lapsed, expires, id)
    for _, key in ipairs({a.lapsed, a.held}) do call('PEXPIRE', key, 2 * window + lease_ms) end
    a.reserved = a.reserved - tokens
    if charge_expired then charge(a, math.floor(expires / a.width), tokens) end
  end
  local newest = math.floor(a.now / a.width)
  if newest > a.newest then roll(a, newest) end
  return a
end

local function record(a, student)
  if student > 0 then
    call('HINCRBY', a.state, 't' .. a.newest, student)
    a.student = a.student + student
    a.total_student = a.total_student + student
  end
end

-- An idle scope vanishes once nothing of it matters any more, its leases before its totals.
local function save(a)
  call('HSET', a.state, 'now', a.now, 'newest', a.newest, 'spent', a.spent, 'student', a.student,
       'reserved', a.reserved, 'total_spent', a.total_spent, 'total_student', a.total_student)
  if a.rolled then call('PEXPIRE', a.state, 3 * a.window + lease_ms) end
end

local function snapshot(a)
  local first, sub_windows = call('ZRANGE', a.leases, 0, 0, 'WITHSCORES'), {}
  local fields = call('HGETALL', a.state)
  for i = 1, #fields, 2 do
    local sub_window = string.match(fields[i], '^s(%d+)$')
    if sub_window then
      sub_windows[#sub_windows + 1] = tonumber(sub_window)
      sub_windows[#sub_windows + 1] = tonumber(fields[i + 1])
    end
  end
  return {a.now, a.spent, a.student, a.reserved, a.total_spent, a.total_student,
          tonumber(first[2]) or -1, sub_windows}
end
"""

RESERVE = """
-- ARGV: now, on_expiry, lease ms, lease id, tokens, at least, student tokens;
-- then by scope: window ms, type, tokens or parts, slack.
local id, student = ARGV[4], tonumber(ARGV[7])
local granted, at_least = tonumber(ARGV[5]), tonumber(ARGV[6])
local accounts, tightest = {}, 0

for i = 1, #KEYS / 4 do
  local k = 4 + 4 * i
  local limit, slack = tonumber(ARGV[k + 2]), tonumber(ARGV[k + 3])
  local a = account(i, tonumber(ARGV[k]))
  accounts[i] = a
  record(a, student)
  local held, room = a.spent + a.reserved, 0
  if ARGV[k + 1] == 'tokens' then
    room = limit - held
  elseif limit == PARTS then
    room = granted
  elseif limit > 0 then
    room = math.floor((limit * (a.student + held) + PARTS * (slack - held)) / (PARTS - limit))
  end
  if room < granted then granted, tightest = room, i end
end

local grants = granted >= at_least
for _, a in ipairs(accounts) do
  -- Sent twice by a client library that tries again, it is still one lease.
  if grants and call('HSETNX', a.held, id, granted) == 1 then
    call('ZADD', a.leases, a.now + lease_ms, id)
    for _, key in ipairs({a.leases, a.held}) do call('PEXPIRE', key, 2 * a.window + lease_ms) end
    a.reserved = a.reserved + granted
  end
  save(a)
end
if grants then return granted end
return {tightest, snapshot(accounts[tightest])}
"""

SETTLE = """
-- ARGV: now, on_expiry, lease ms, lease id, used; then by scope: window ms.
local id, used, outcome = ARGV[4], tonumber(ARGV[5]), 'unknown'

for i = 1, #KEYS / 4 do
  local a = account(i, tonumber(ARGV[5 + i]))
  local tokens = tonumber(call('HGET', a.held, id))
  if not tokens and used == 0 then
    -- Perhaps given up before it has arrived: held with 0 tokens, it is not made when it does.
    call('HSET', a.held, id, 0)
    call('ZADD', a.lapsed, a.now, id)
    for _, key in ipairs({a.lapsed, a.held}) do call('PEXPIRE', key, 2 * a.window + lease_ms) end
  elseif tokens and tokens > 0 then
    if call('ZREM', a.leases, id) == 1 then
      a.reserved = a.reserved - tokens
      charge(a, a.newest, used)
      outcome = 'settled'
    else
      local expires = tonumber(call('ZSCORE', a.lapsed, id))
      call('ZREM', a.lapsed, id)
      charge(a, math.floor(expires / a.width), used - (charge_expired and tokens or 0))
      outcome = 'late'
    end
    call('HDEL', a.held, id)
  end
  save(a)
end
return outcome
"""

RECORD = """
-- ARGV: now, on_expiry, lease ms, student tokens; then by scope: window ms.
for i = 1, #KEYS / 4 do
  local a = account(i, tonumber(ARGV[4 + i]))
  record(a, tonumber(ARGV[4]))
  save(a)
end
"""

STATUS = """
-- ARGV: now, on_expiry, lease ms; then by scope: window ms.
local result = {}
for i = 1, #KEYS / 4 do
  local a = account(i, tonumber(ARGV[3 + i]))
  save(a)
  result[i] = snapshot(a)
end
return result
"""


class Script:
    """One operation's text, and the digest by which Redis remembers it."""

    def __init__(self, body: str) -> None:
        self.text = PRELUDE + body
        self.digest = sha1(self.text.encode()).hexdigest()


reserve, settle, record, status = map(Script, (RESERVE, SETTLE, RECORD, STATUS))
