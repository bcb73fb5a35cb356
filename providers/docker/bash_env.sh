# Read by every shell of the agent's that is no terminal. When a sandbox's memory runs out, what the agent has started goes
# before the runner, so that the call fails and not the session. The score can be raised by anybody and lowered by nobody.
echo 500 2>/dev/null >/proc/self/oom_score_adj || :
