"""Measuring a pair from outside: data files, right answers, and a client of a running gateway.

`server` (the demo and the benchmarks) and `training` (`wheels evaluate`) both measure, and may not import
each other. `router` decides and knows neither data files nor HTTP. So this part has a package of its own.
"""
