"""A run directory as one HTML page that needs nothing else to be read; it runs nothing itself.

reading    the files of a run, and what is missing of them
words      names, numbers and model text as the page writes them
view       the results, arranged for looking things up
headline   the first sentence, and the differences that stand behind it
pictures   dots, whiskers and curves as places in an SVG
samples    answers and analyses, drawn at random
page       all of it, put into report.html.j2, which decides the look
"""
