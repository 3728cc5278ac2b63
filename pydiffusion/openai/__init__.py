"""OpenAI's API: requests, responses and errors, without HTTP."""
