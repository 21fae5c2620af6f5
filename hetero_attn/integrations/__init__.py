"""hetero_attn inside other people's libraries, one file a library.

Nothing is imported here: a library is loaded by whoever imports its file, never by `import hetero_attn`.
"""
