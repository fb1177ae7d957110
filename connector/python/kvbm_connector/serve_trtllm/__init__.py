"""A worker over TensorRT-LLM's LLM API, for the frontend of kvbm: `python -m kvbm_connector.serve_trtllm --help`.

    frontend ── kvbm.v1.Worker ──► service ──► requests ──► LLM.generate_async
                                      └──◄── tokens ◄──────────┘

The engine's connector is set up by it, unless the engine's arguments name another one.
"""
