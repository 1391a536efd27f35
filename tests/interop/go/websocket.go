package main

import (
	"crypto/tls"
	"crypto/x509"
	"flag"
	"os"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/p2p/transport/websocket"
)

// webSockets says where to listen, with which certificate, and whose certificates to believe.
type webSockets struct {
	listen, certificate, key, trust string
}

func (w *webSockets) flags() {
	flag.StringVar(&w.listen, "listen", "/ip4/127.0.0.1/tcp/0", "multiaddr to listen on")
	flag.StringVar(&w.certificate, "certificate", "", "certificate for listening with TLS")
	flag.StringVar(&w.key, "certificate-key", "", "its key")
	flag.StringVar(&w.trust, "trust", "", "the authority that is believed when dialling with TLS")
}

func (w *webSockets) transport() libp2p.Option {
	options := []any{}
	if w.certificate != "" {
		pair, err := tls.LoadX509KeyPair(w.certificate, w.key)
		if err != nil {
			fatal(err)
		}
		options = append(options, websocket.WithTLSConfig(&tls.Config{Certificates: []tls.Certificate{pair}}))
	}
	if w.trust != "" {
		content, err := os.ReadFile(w.trust)
		if err != nil {
			fatal(err)
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(content)
		options = append(options, websocket.WithTLSClientConfig(&tls.Config{RootCAs: roots}))
	}
	return libp2p.Transport(websocket.New, options...)
}
