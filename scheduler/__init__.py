"""Decides which jobs run where and when. Pure: no asyncio, threads, processes, clock or torch. Time is an argument."""
