"""Many prompts from a JSONL file, without a server.

``lines`` reads the lines, ``answering`` answers them, ``answer_file`` keeps the answers, so that a run can be
resumed. ``pydiffusion batch`` and examples/batch_on_ray.py are built of these.
"""
