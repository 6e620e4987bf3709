package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	reg "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// serve runs until ctx is done. Without a kubelet (no registration directory) only the
// CSI socket is served.
func serve(ctx context.Context, d *driver) error {
	s := grpc.NewServer(grpc.ChainUnaryInterceptor(logCall, d.injectFaults), grpc.StreamInterceptor(logStream))
	csi.RegisterIdentityServer(s, d)
	csi.RegisterControllerServer(s, d)
	csi.RegisterNodeServer(s, d)
	if d.hasDevices() {
		csi.RegisterGroupControllerServer(s, d)
		csi.RegisterSnapshotMetadataServer(s, d)
	}
	l, err := listen(d.endpoint)
	if err != nil {
		return err
	}
	ended := make(chan error, 2)
	go func() { ended <- s.Serve(l) }()
	defer s.Stop()
	if d.registrationDir != "" {
		l, err := listen(filepath.Join(d.registrationDir, d.driverName+"-reg.sock"))
		if err != nil {
			return err
		}
		r := grpc.NewServer()
		reg.RegisterRegistrationServer(r, &registrar{name: d.driverName, endpoint: d.endpoint})
		go func() { ended <- r.Serve(l) }()
		defer r.Stop()
	}
	log.Printf("%s serves node %s on %s", d.driverName, d.nodeID, d.endpoint)
	select {
	case <-ctx.Done():
		return nil
	case err := <-ended:
		return fmt.Errorf("serve: %w", err)
	}
}

// listen takes over a socket that an instance that died left behind.
func listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove the old socket: %w", err)
	}
	return net.Listen("unix", path)
}

func logCall(ctx context.Context, q any, i *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
	start := time.Now()
	r, err := h(ctx, q)
	logEnd(i.FullMethod, start, err)
	return r, err
}

func logStream(srv any, s grpc.ServerStream, i *grpc.StreamServerInfo, h grpc.StreamHandler) error {
	start := time.Now()
	err := h(srv, s)
	logEnd(i.FullMethod, start, err)
	return err
}

func logEnd(method string, start time.Time, err error) {
	took := time.Since(start).Round(time.Microsecond)
	if err != nil {
		log.Printf("%s %v: %v", method, took, err)
		return
	}
	log.Printf("%s %v", method, took)
}

// registrar answers the kubelet's plugin watcher, so no registration sidecar is needed.
type registrar struct {
	reg.UnimplementedRegistrationServer
	name, endpoint string
}

func (r *registrar) GetInfo(context.Context, *reg.InfoRequest) (*reg.PluginInfo, error) {
	return &reg.PluginInfo{Type: reg.CSIPlugin, Name: r.name, Endpoint: r.endpoint, SupportedVersions: []string{"1.0.0"}}, nil
}

func (r *registrar) NotifyRegistrationStatus(_ context.Context, s *reg.RegistrationStatus) (*reg.RegistrationStatusResponse, error) {
	log.Printf("kubelet registration: registered=%v %s", s.PluginRegistered, s.Error)
	return &reg.RegistrationStatusResponse{}, nil
}
