"""What a directory holds as a page, as Markdown and as a picture; runs nothing itself.

Every page needs nothing else to be read. The way in is `pages`; each module's first line says
what it is for.
"""
