"""The box's end of its way out: a listener on the loopback, and for each connection a stream of frames to the host.
Law as in worker.py: standard library only, C modules only. It understands nothing of what it carries: the host alone
knows what may be reached.

Sent along only to a box with an allow-list, and part of the worker because nothing in the box can kill or stop that. A
stream has a number, 1, 2, 3, ...; its frames to the host are {"net": number, "event": ...}: open, data, end, took (so
many bytes went on to the program) and, as the last one, gone. From the host come data, end, took and drop. Neither end
has more than WINDOW bytes of a stream under way, so a slow reader stops its writer and nothing else.
"""

import _socket
import select

HOST, PORT = "127.0.0.1", 3128
WINDOW = 1 << 16
CHUNK = 1 << 15
BROKEN = select.POLLHUP | select.POLLERR
READ, WRITE = select.POLLIN | BROKEN, select.POLLOUT | BROKEN


class Stream:
    def __init__(self, connection):
        self.connection = connection
        self.credit = WINDOW  # bytes that the host will take
        self.waiting = bytearray()  # for the program
        self.has_read_all = False  # the program writes no more
        self.is_ending = self.has_ended = False  # the host writes no more; the program was told


class Network:
    """Made before anything else runs in the box that could take the listener's place."""

    def __init__(self, line, at_once):
        self.line, self.at_once = line, at_once
        self.listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        self.listener.bind((HOST, PORT))
        self.listener.listen(at_once)
        self.listener.setblocking(False)
        self.streams = {}  # number -> Stream
        self.by_fd = {}  # descriptor -> number
        self.dropped = []  # numbers; a frame of the host may come while one to it is half sent
        self.next_number = 1

    def fds(self):
        """What to wait for: {fd: poll events}."""
        while self.dropped:
            number = self.dropped.pop()
            if number in self.streams:
                self.forget(number)
        wanted = {}
        if len(self.streams) < self.at_once:
            wanted[self.listener.fileno()] = select.POLLIN
        for fd, number in self.by_fd.items():
            stream = self.streams[number]
            events = 0
            if stream.credit > 0 and not stream.has_read_all:
                events |= select.POLLIN
            if stream.waiting or (stream.is_ending and not stream.has_ended):
                events |= select.POLLOUT
            if events:
                wanted[fd] = events
        return wanted

    def serve(self, ready):
        numbers = [(self.by_fd[fd], events) for fd, events in ready.items() if fd in self.by_fd]
        for number, events in numbers:
            try:
                self.move(number, self.streams[number], events)
            except OSError:  # the program is gone
                self.forget(number)
        if self.listener.fileno() in ready:
            self.accept()

    def accept(self):
        try:
            fd, _ = self.listener._accept()  # pyright: ignore[reportAttributeAccessIssue]
        except OSError:
            return
        connection = _socket.socket(fileno=fd)
        connection.setblocking(False)
        number, self.next_number = self.next_number, self.next_number + 1
        self.streams[number] = Stream(connection)
        self.by_fd[fd] = number
        self.tell(number, "open")

    def move(self, number, stream, events):
        if events & WRITE and stream.waiting:
            sent = stream.connection.send(bytes(stream.waiting[:CHUNK]))
            del stream.waiting[:sent]
            self.line.send({"net": number, "event": "took", "size": sent}, b"")
        if stream.is_ending and not stream.waiting and not stream.has_ended:
            stream.has_ended = True
            stream.connection.shutdown(_socket.SHUT_WR)
        if events & READ and stream.credit > 0 and not stream.has_read_all:
            self.read(number, stream)
        if stream.has_read_all and stream.has_ended:
            self.forget(number)

    def read(self, number, stream):
        try:
            data = stream.connection.recv(min(CHUNK, stream.credit))
        except BlockingIOError:
            return
        stream.credit -= len(data)
        stream.has_read_all = not data
        if data:
            self.line.send({"net": number, "event": "data"}, data)
        else:
            self.tell(number, "end")

    def take(self, fields, body):
        """A frame of the host. Nothing is sent here."""
        stream = self.streams.get(fields["net"])
        if stream is None:
            return  # the host had not heard yet that it is gone
        event = fields["event"]
        if event == "data":
            stream.waiting += body
        elif event == "end":
            stream.is_ending = True
        elif event == "took":
            stream.credit += fields["size"]
        else:
            self.dropped.append(fields["net"])

    def forget(self, number):
        stream = self.streams.pop(number)
        del self.by_fd[stream.connection.fileno()]
        stream.connection.close()
        self.tell(number, "gone")

    def tell(self, number, event):
        self.line.send({"net": number, "event": event}, b"")
