"""The protobuf messages that cross the wire, generated from the `.proto` files beside this one.

After a change to a `.proto` file, from the top of the repository::

    python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. protocol/pb/*.proto

Strings that a peer sends are declared `bytes` (the wire form is the same), so that bad UTF-8 is met where it
can be judged. Each message has one module that knows it (`protocol.keys`, `protocol.noise`,
`protocol.signed_envelope`, `protocol.peer_record`, `protocol.identify`; `protocol.circuit.messages` and
`protocol.circuit.voucher` share one file); nothing else imports from here.
"""
