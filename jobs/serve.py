"""Serve a policy to robots: protocol=openpi (websocket) or protocol=groot (ZeroMQ)."""

from jobs.running import job

main = job("serve")

if __name__ == "__main__":
    main()
