"""OpenAI's API without HTTP: requests, responses, errors."""
