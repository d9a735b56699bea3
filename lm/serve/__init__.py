"""``kindling serve``: a run over HTTP, in OpenAI's words and as a page to play with.

``engine`` computes, in a thread of its own; ``schema`` reads requests, ``answers`` words the answers; ``guard`` stands
at the door; ``app`` puts them together.
"""
