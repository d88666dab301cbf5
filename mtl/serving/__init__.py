"""A server of predictions that learns: it needs the tables now and then, and Spark never.

    tables ── source ──► refresh ──► store ──┐
                            │                ├──► view ──► service ──► http
              takeover, coverage             │      (scorer)   (api, requests, openapi, metrics)
                            ▼                │                    │
                         overlay ────────────┘◄── observer ◄──────┘
                                                     ▼
                                               observations, a log that jobs/ingest.py reads

``server`` has the processes: a supervisor, workers (all that is right of store and overlay), and a refresher (the rest, with
``housekeeping`` as its loop). ``records`` has the bytes of users, ``wire`` how answers leave.
"""
