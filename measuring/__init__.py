"""Measuring a pair from outside: data files, scores, a gateway client, and servers to start.

`server` (the demo and the benchmarks) and `training` (`wheels evaluate`, the router's stage) both measure,
and may not import each other. `router` decides and knows neither data files nor HTTP. So this part has a
package of its own. Servers are started as a user starts them, by their commands.
"""
