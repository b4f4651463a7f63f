"""The teacher: a client for one server, a pool of its replicas, and single calls for the span loop."""
