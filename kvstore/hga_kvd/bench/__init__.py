"""`hga-kvd bench`: how fast this box stores and fetches K/V, measured through a real daemon and the client library.

What always holds:
- Every fetched record that is looked at must be what was appended; a wrong byte ends the run with an error.
- What is compared with (fio, or the reads alone on the I/O engine) is measured in the same run, in turns with ours.
- No torch: the calls go through hga_kvd_client.connection, which does without (ADR 0017).

command.py is the hub: it knows the profiles. A profile is a generator of what it does (text, for the progress bar) and of
the Cases it measured. content, trace, meter and report are pure; daemon and probes touch processes, files and clocks.
"""
