"""The ledger's operations inside Redis: one Lua script each, all over one prelude.

State of a scope, four keys in one slot (every key of a ledger carries one hash tag):

    state    hash: now, newest (sub-window), spent, student, reserved, total_spent, total_student,
             and s<i>, t<i>: teacher and student tokens of sub-window i
    held     hash: lease id -> tokens; 0 for one that was given up
    (a limit in money counts nanos instead of teacher tokens; the state of a session has its limit too)
    leases   sorted set of lease ids by the ms at which they expire
    lapsed   sorted set of expired lease ids, with the same scores, and of those that were given up

`router.ledger.account.Account` does the same in Python and gives the reasons. The clock is that of Redis.
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

-- How long leases outlive their last change.
local function ttl(a)
  return a.idle > 0 and math.max(a.idle, 2 * lease_ms) or 2 * a.window + lease_ms
end

-- The account of the i-th scope as of now. One with an idle time is a session's: there while it is open.
local function account(i, window, idle)
  local k = 4 * (i - 1)
  local a = {state = KEYS[k + 1], held = KEYS[k + 2], leases = KEYS[k + 3], lapsed = KEYS[k + 4]}
  local values = call('HMGET', a.state, unpack(TOTALS))
  for j, name in ipairs(TOTALS) do a[name] = tonumber(values[j]) or 0 end
  a.window, a.idle = window, idle
  a.gone = idle > 0 and not values[1]
  a.width = math.ceil(window / SUB_WINDOWS)
  a.now = math.max(a.now, now)
  for _, id in ipairs(call('ZRANGEBYSCORE', a.leases, '-inf', a.now)) do
    local tokens, expires = tonumber(call('HGET', a.held, id)), tonumber(call('ZSCORE', a.leases, id))
    call('ZREM', a.leases, id)
    call('ZADD', a.lapsed, expires, id)
    for _, key in ipairs({a.lapsed, a.held}) do call('PEXPIRE', key, ttl(a)) end
    a.reserved = a.reserved - tokens
    if charge_expired then charge(a, math.floor(expires / a.width), tokens) end
  end
  local newest = math.floor(a.now / a.width)
  if newest > a.newest then roll(a, newest) end
  return a
end

local function record(a, student)
  if student > 0 and not a.gone then
    call('HINCRBY', a.state, 't' .. a.newest, student)
    a.student = a.student + student
    a.total_student = a.total_student + student
  end
end

-- An idle scope vanishes once nothing of it matters any more, its leases before its totals.
local function save(a)
  if a.gone then return end
  call('HSET', a.state, 'now', a.now, 'newest', a.newest, 'spent', a.spent, 'student', a.student,
       'reserved', a.reserved, 'total_spent', a.total_spent, 'total_student', a.total_student)
  if a.idle > 0 then
    call('PEXPIRE', a.state, ttl(a))
  elseif a.rolled then
    call('PEXPIRE', a.state, 3 * a.window + lease_ms)
  end
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
-- ARGV: now, on_expiry, lease ms, lease id, tokens, at least, student tokens, nanos for reading, nanos for
-- each token; then by scope: window ms, idle ms, type, tokens, nanos or parts, slack.
local id, student = ARGV[4], tonumber(ARGV[7])
local granted, at_least = tonumber(ARGV[5]), tonumber(ARGV[6])
local fixed, each = tonumber(ARGV[8]), tonumber(ARGV[9])
local accounts, in_money, tightest = {}, {}, 0

for i = 1, #KEYS / 4 do
  local k = 5 + 5 * i
  local kind, limit, slack = ARGV[k + 2], tonumber(ARGV[k + 3]), tonumber(ARGV[k + 4])
  local a = account(i, tonumber(ARGV[k]), tonumber(ARGV[k + 1]))
  accounts[i] = a
  record(a, student)
  local held, room = a.spent + a.reserved, 0
  in_money[i] = kind == 'cost'
  if a.gone then
    room = 0
  elseif kind == 'tokens' then
    room = limit - held
  elseif in_money[i] then
    local left = limit - held
    if left >= math.max(1, fixed) then
      room = each == 0 and granted or math.floor((left - fixed) / each)
    end
  elseif limit == PARTS then
    room = granted
  elseif limit > 0 then
    room = math.floor((limit * (a.student + held) + PARTS * (slack - held)) / (PARTS - limit))
  end
  if room < granted then granted, tightest = room, i end
end

local grants = granted >= at_least
for i, a in ipairs(accounts) do
  local amount = in_money[i] and math.max(1, fixed + each * granted) or granted
  -- Sent twice by a client library that tries again, it is still one lease.
  if grants and call('HSETNX', a.held, id, amount) == 1 then
    call('ZADD', a.leases, a.now + lease_ms, id)
    for _, key in ipairs({a.leases, a.held}) do call('PEXPIRE', key, ttl(a)) end
    a.reserved = a.reserved + amount
  end
  save(a)
end
if grants then return granted end
return {tightest, snapshot(accounts[tightest])}
"""

SETTLE = """
-- ARGV: now, on_expiry, lease ms, lease id; then by scope: window ms, idle ms, used, tokens to record too.
local id, outcome = ARGV[4], 'unknown'

for i = 1, #KEYS / 4 do
  local k = 1 + 4 * i
  local a, used = account(i, tonumber(ARGV[k]), tonumber(ARGV[k + 1])), tonumber(ARGV[k + 2])
  local tokens = tonumber(call('HGET', a.held, id))
  if not tokens and used == 0 then
    -- Perhaps given up before it has arrived: held with 0 tokens, it is not made when it does.
    call('HSET', a.held, id, 0)
    call('ZADD', a.lapsed, a.now, id)
    for _, key in ipairs({a.lapsed, a.held}) do call('PEXPIRE', key, ttl(a)) end
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
    record(a, tonumber(ARGV[k + 3]))
    call('HDEL', a.held, id)
  end
  save(a)
end
return outcome
"""

RECORD = """
-- ARGV: now, on_expiry, lease ms, student tokens; then by scope: window ms, idle ms.
for i = 1, #KEYS / 4 do
  local a = account(i, tonumber(ARGV[3 + 2 * i]), tonumber(ARGV[4 + 2 * i]))
  record(a, tonumber(ARGV[4]))
  save(a)
end
"""

STATUS = """
-- ARGV: now, on_expiry, lease ms; then by scope: window ms, idle ms.
local result = {}
for i = 1, #KEYS / 4 do
  local a = account(i, tonumber(ARGV[2 + 2 * i]), tonumber(ARGV[3 + 2 * i]))
  save(a)
  result[i] = snapshot(a)
end
return result
"""


OPEN_SESSION = """
-- KEYS: of the scope in tokens, of that in nanos, and a sorted set of the owner's sessions by their ends.
-- ARGV: now, on_expiry, lease ms, session id, tokens, nanos (either may be empty), idle ms, most sessions.
local states, index = {KEYS[1], KEYS[5]}, KEYS[9]
local given, known = {tonumber(ARGV[5]), tonumber(ARGV[6])}, {}
local lives = math.max(tonumber(ARGV[7]), 2 * lease_ms)
for i = 1, 2 do known[i] = tonumber(call('HGET', states[i], 'limit') or '') end

call('ZREMRANGEBYSCORE', index, '-inf', now)
if known[1] or known[2] then
  for i = 1, 2 do
    if given[i] and given[i] ~= known[i] then return 'conflict' end
  end
elseif not (given[1] or given[2]) then
  return 'unknown'
elseif call('ZCARD', index) >= tonumber(ARGV[8]) then
  return 'full'
else
  known = given
  for i = 1, 2 do
    if known[i] then call('HSET', states[i], 'limit', ARGV[4 + i], 'now', now) end
  end
end
for i = 1, 2 do
  if known[i] then call('PEXPIRE', states[i], lives) end
end
call('ZADD', index, now + lives, ARGV[4])
call('PEXPIRE', index, lives)
return {known[1] or -1, known[2] or -1}
"""


class Script:
    """One operation's text, and the digest that Redis knows it by."""

    def __init__(self, body: str) -> None:
        self.text = PRELUDE + body
        self.digest = sha1(self.text.encode()).hexdigest()


reserve, settle, record, status, open_session = map(Script, (RESERVE, SETTLE, RECORD, STATUS, OPEN_SESSION))
