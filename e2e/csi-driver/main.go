// Lifeboat's test CSI driver: volumes are image files in one btrfs subvolume, so that a
// snapshot is an atomic cut and a group snapshot is one over several volumes; or subvolumes.
// It is a part of the tests and must never be an image of the chart.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

const version = "0.1.0"

// options are the flags. Every node runs one instance; all of them share one pool.
type options struct {
	driverName      string
	endpoint        string // path of the socket
	nodeID          string
	pool            string // a directory on btrfs
	registrationDir string // empty: does not register with a kubelet
	topology        bool
	trees           bool
	faults          string // the control file
	capacity        int64  // bytes
}

func parseOptions(args []string) (options, error) {
	var o options
	f := flag.NewFlagSet("lifeboat-test-csi", flag.ContinueOnError)
	f.StringVar(&o.driverName, "driver-name", "csi.test.lifeboat.dev", "name under which the driver registers")
	f.StringVar(&o.endpoint, "endpoint", "unix:///csi/csi.sock", "unix socket to serve on")
	f.StringVar(&o.nodeID, "node-id", "", "name of this node (required)")
	f.StringVar(&o.pool, "pool", "", "btrfs directory that all instances share (required)")
	f.StringVar(&o.registrationDir, "registration-dir", "", "the kubelet's plugins_registry; empty: do not register")
	f.BoolVar(&o.topology, "topology", false, "a volume can be used on one node only")
	f.BoolVar(&o.trees, "trees", false, "volumes are file trees that several nodes share, not block devices")
	f.StringVar(&o.faults, "faults", "", "file that says what goes wrong on purpose (default: faults in the pool)")
	f.Int64Var(&o.capacity, "capacity", 100<<30, "bytes that all volumes together may claim")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if o.faults == "" {
		o.faults = filepath.Join(o.pool, "faults")
	}
	o.endpoint = strings.TrimPrefix(o.endpoint, "unix://")
	switch {
	case f.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q", f.Arg(0))
	case o.nodeID == "":
		return o, errors.New("--node-id is required")
	case o.pool == "":
		return o, errors.New("--pool is required")
	case !strings.HasPrefix(o.endpoint, "/"):
		return o, fmt.Errorf("--endpoint %q is not unix:// with an absolute path", o.endpoint)
	}
	return o, nil
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "fault" {
		if err := controlFaults(os.Args[2:]); err != nil {
			log.Fatal(err)
		}
		return
	}
	o, err := parseOptions(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		log.Fatal(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, o); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, o options) error {
	d, err := openDriver(o)
	if err != nil {
		return err
	}
	return serve(ctx, d)
}
