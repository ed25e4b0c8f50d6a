"""Stores: storage + selection + rate limit. An algorithm asks for the one it learns from.

    insert(lane, unroll) -> valid env steps    sample() -> what one update learns from
    updates_allowed() -> int                   insert_limit() -> env steps that may be started
    expire(version)                            drops what is too old for it
    metrics(), state_dict(), load_state_dict(), position(), restart_at(); `limiter` counts
"""
