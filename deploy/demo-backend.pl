#!/usr/bin/perl
# The backend of `make demo`: an HTTP server in what every Debian has (perl-base). It answers any request with one line
# that says which process it is: `run` is drawn at random when it starts, `requests` is a number it keeps in memory.
use strict;
use warnings;
use IO::Socket::INET;

# Seconds a client may take to send its request.
use constant REQUEST_TIMEOUT_S => 5;
# Longest request head that is read, in bytes.
use constant HEAD_BYTES_MAX => 8192;

my ($key, $backend, $token, $port) =
    map { $ENV{$_} // die "demo-backend: $_ is not set; is this run by a drone?\n" }
    qw(SESSION_BACKEND_KEY SESSION_BACKEND_ID SESSION_BACKEND_FENCING_TOKEN PORT);

open(my $random, '<:raw', '/dev/urandom') or die "demo-backend: /dev/urandom: $!\n";
read($random, my $bytes, 4) == 4 or die "demo-backend: /dev/urandom: too short\n";
close($random);
my $run = unpack('H*', $bytes);

$SIG{TERM} = sub { exit 0 };
$SIG{PIPE} = 'IGNORE';

# No LocalAddr: the drone decides on which address it announces us.
my $listener = IO::Socket::INET->new(LocalPort => $port, Listen => 16, ReuseAddr => 1)
    or die "demo-backend: port $port: $@\n";

my $requests = 0;
while (1) {
    my $client = $listener->accept or next;
    # alarm ends a read that waits too long; eval keeps the server alive.
    eval {
        local $SIG{ALRM} = sub { die "slow client\n" };
        alarm REQUEST_TIMEOUT_S;
        my $request = '';
        until ($request =~ /\r?\n\r?\n/) {
            die "request head too long\n" if length($request) > HEAD_BYTES_MAX;
            sysread($client, $request, 1024, length($request)) or die "client went away\n";
        }
        my ($method) = $request =~ /^([A-Z]+) /;
        $method //= '';
        $requests++ if $method eq 'GET';
        my $body = "key=$key backend=$backend token=$token pid=$$ run=$run requests=$requests\n";
        my $head = "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: "
            . length($body) . "\r\nConnection: close\r\n\r\n";
        print {$client} $method eq 'HEAD' ? $head : $head . $body;
        $client->flush;
    };
    alarm 0;
    close($client);
}
