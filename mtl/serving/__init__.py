"""A server of predictions that learns: it needs the tables now and then, and Spark never.

    tables ── source ──► refresh ──► store ──┐
                            │                ├──► view ──► service ──► http
     takeover, coverage, history             │      │        │  (api, requests, ranking, openapi, metrics, gauges)
                            ▼                │      │        ├── predictions (turn), inspection, neighbours
                         overlay ────────────┘◄─────│── observer ◄── choices (bandit)
                                                    │        ▼
              evaluator (functions, anytime, ───────┘   observations: logs that jobs/ingest.py and
              executor, classes, cache)                 jobs/offpolicy.py (decisions, offpolicy) read

``scorer`` has the sums. ``evaluator`` makes features of inputs that are given by attributes, cached and in time; ``admission``
holds a latency objective by what ``load`` decides. ``server`` has the processes: a supervisor, workers (all that is right of
store and overlay), and a refresher (the rest, with ``housekeeping`` as its loop). ``records`` has the bytes of users, ``wire``
how requests come and answers leave.
"""
