"""A model over HTTP, the way OpenAI's clients ask for one.

``/v1/chat/completions``, ``/v1/completions`` and ``/v1/models``, one generation at a time, a
key on every route. May import inference and everything below; HTTP is nowhere else.

    engine     what is asked of an engine
    request    what a client asks for, checked field by field
    reply      what it gets, in OpenAI's shapes
    worker     the thread that generates, and the queue before it
    app        the routes
    server     the socket, the key, the end
"""
