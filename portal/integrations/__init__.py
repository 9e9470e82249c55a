"""What lies outside the portal: the certificate authority, SSH, ansible-runner, the queue. No rule lives here."""
