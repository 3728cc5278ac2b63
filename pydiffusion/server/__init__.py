"""An HTTP server with OpenAI's API in front of one model. Needs the ``server`` extra (FastAPI, uvicorn)."""
