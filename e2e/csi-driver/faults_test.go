package main

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestParseFault(t *testing.T) {
	got, err := parseFault("CreateSnapshot claim=shop/data fail=2 code=RESOURCE_EXHAUSTED hang=1s late=2s readyAfter=1m")
	if err != nil || got.claim != "shop/data" || got.fail != 2 || got.code != codes.ResourceExhausted || got.hang != time.Second ||
		got.late != 2*time.Second || !maps.Equal(got.parameters, map[string]string{"readyAfter": "1m"}) {
		t.Errorf("got %+v %v", got, err)
	}
	for _, good := range []string{"PoolFull", "NodePublishVolume hang=1h", "GetMetadataDelta lie=empty fail=1", "DeleteVolume late=0s"} {
		if _, err := parseFault(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{"", "createSnapshot fail=1", "CreateSnapshot", "PoolFull fail=1", "CreateVolume readyAfter=1s", "CreateVolume fail=-1",
		"CreateVolume fail=01", "CreateVolume hang=1", "CreateVolume code=BROKEN", "CreateSnapshot mode=Torn", "GetMetadataDelta lie=big",
		"CreateSnapshot lie=empty", "GetMetadataDelta late=1s", "CreateVolume claim="} {
		if f, err := parseFault(bad); err == nil {
			t.Errorf("%q was accepted: %+v", bad, f)
		}
	}
}

// faulty calls a driver without a pool through the interceptor; the handler says what it was asked.
func faulty(t *testing.T, lines ...string) (fs faults, call func(ctx context.Context, name string, q any) error, calls *[]any) {
	t.Helper()
	dir := t.TempDir()
	fs = faults{filepath.Join(dir, "faults")}
	for _, line := range lines {
		if err := controlFaults(append([]string{fs.file}, strings.Fields(line)...)); err != nil {
			t.Fatal(err)
		}
	}
	d := &driver{faults: fs, records: records{dir}}
	calls = &[]any{}
	return fs, func(ctx context.Context, name string, q any) error {
		_, err := d.injectFaults(ctx, q, &grpc.UnaryServerInfo{FullMethod: "/csi.v1.Any/" + name}, func(_ context.Context, q any) (any, error) {
			*calls = append(*calls, q)
			return nil, nil
		})
		return err
	}, calls
}

func volumeOf(claim string) *csi.CreateVolumeRequest {
	namespace, name, _ := strings.Cut(claim, "/")
	return &csi.CreateVolumeRequest{Parameters: map[string]string{sidecarPrefix + "pvc/namespace": namespace, sidecarPrefix + "pvc/name": name}}
}

func TestFaultsAreCountedByClaim(t *testing.T) {
	fs, call, _ := faulty(t, "CreateVolume claim=shop fail=2 code=UNAVAILABLE", "DeleteVolume fail=1")
	for _, c := range []struct {
		call, claim string
		want        codes.Code
	}{
		{"CreateVolume", "shopping/a", codes.OK}, {"CreateVolume", "shop/a", codes.Unavailable}, {"DeleteVolume", "x/y", codes.Internal},
		{"DeleteVolume", "x/y", codes.OK}, {"CreateVolume", "shop/b", codes.Unavailable}, {"CreateVolume", "shop/a", codes.OK},
	} {
		if err := call(t.Context(), c.call, volumeOf(c.claim)); status.Code(err) != c.want {
			t.Errorf("%+v: got %v", c, err)
		}
	}
	if _, err := os.Stat(fs.file); !os.IsNotExist(err) {
		t.Errorf("the file outlives its faults: %v", err)
	}
}

func TestFaultsHangUntilTheyAreCleared(t *testing.T) {
	fs, call, calls := faulty(t, "CreateSnapshot hang=1h")
	short, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if err := call(short, "CreateSnapshot", &csi.CreateSnapshotRequest{}); status.Code(err) != codes.DeadlineExceeded || len(*calls) != 0 {
		t.Errorf("got %v", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- call(t.Context(), "CreateSnapshot", &csi.CreateSnapshotRequest{}) }()
	if err := controlFaults([]string{fs.file, "clear"}); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil || len(*calls) != 1 {
		t.Errorf("after the clear: %v, %d calls", err, len(*calls))
	}
}

func TestFaultsAreClearedByWord(t *testing.T) {
	fs, _, _ := faulty(t, "CreateSnapshot claim=a fail=1", "CreateSnapshot claim=b fail=1", "PoolFull")
	if err := controlFaults([]string{fs.file, "clear", "claim=a"}); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadFile(fs.file)
	if got := strings.TrimSpace(string(left)); err != nil || got != "CreateSnapshot claim=b fail=1\nPoolFull" {
		t.Errorf("left %q, %v", got, err)
	}
}

func TestFaultsGiveParametersAndComeLate(t *testing.T) {
	_, call, calls := faulty(t, "CreateSnapshot readyAfter=1h late=1h")
	short, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	err := call(short, "CreateSnapshot", &csi.CreateSnapshotRequest{})
	if status.Code(err) != codes.DeadlineExceeded || len(*calls) != 1 {
		t.Fatalf("got %v, %d calls: it must be carried out, and answered too late", err, len(*calls))
	}
	if got := (*calls)[0].(*csi.CreateSnapshotRequest).Parameters["readyAfter"]; got != "1h" {
		t.Errorf("readyAfter is %q", got)
	}
}

func TestFullPool(t *testing.T) {
	_, call, calls := faulty(t, "PoolFull")
	for _, name := range roomCalls {
		if err := call(t.Context(), name, nil); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := call(t.Context(), "DeleteVolume", nil); err != nil || len(*calls) != 1 {
		t.Errorf("nothing can be deleted: %v", err)
	}
}

func TestBrokenFaultsAreNotPassedOver(t *testing.T) {
	fs, call, _ := faulty(t)
	if err := os.WriteFile(fs.file, []byte("CreateSnapshot fial=1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := call(t.Context(), "CreateSnapshot", nil); status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "fial") {
		t.Errorf("got %v", err)
	}
	if err := controlFaults([]string{fs.file, "CreateSnapshot", "fial=1"}); err == nil {
		t.Error("a typing error was accepted")
	}
}

func TestLying(t *testing.T) {
	const k = blockSize
	ranges := []extent{{0, k, 1}, {4 * k, k, 3}}
	for lie, want := range map[string][]int64{"": {0, 4}, lieIncomplete: {0}, lieEmpty: nil, lieBeyond: {0, 4, 17}, lieBroken: {0}} {
		var got []int64
		told, send := lying(lie, slices.Clone(ranges), 16*k, func(b []*csi.BlockMetadata) error {
			for _, x := range b {
				got = append(got, x.ByteOffset/k)
			}
			return nil
		})
		err := replies(told, 16*k, 0, 0, send)
		if !slices.Equal(got, want) || (lie == lieBroken) != (status.Code(err) == codes.Unavailable) {
			t.Errorf("%q: got %v %v, want %v", lie, got, err, want)
		}
	}
}
