"""The teacher: a client for one of its servers, all of them as one, one call as the span loop takes it."""
